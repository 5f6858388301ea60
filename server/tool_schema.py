"""Whether a tool's parameters are a JSON schema at all. What a schema means is the grammar's business."""

from __future__ import annotations

from typing import Any

from tokenmill.server.errors import ApiError, bad_request, shorten

TYPES = frozenset(["object", "array", "string", "number", "integer", "boolean", "null"])
MAX_DEPTH = 100

_ONE = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def check_parameters(schema: dict[str, Any], where: str) -> None:
    """Refuse what isn't the schema of an object. Raises `ApiError` 400."""
    if schema.get("type", "object") != "object":
        raise _wrong(f"{where}.type", '"object"', schema["type"])
    _check(schema, where, MAX_DEPTH)


def _check(schema: object, where: str, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(where, "a schema (an object, true or false)", schema)
    if not depth:
        raise bad_request(f"{where.split('.parameters')[0]}.parameters is nested too deeply", "tools")
    _check_plain(schema, where)
    for key in _ONE:
        if key in schema and not (key == "items" and isinstance(schema[key], list)):
            _check(schema[key], f"{where}.{key}", depth - 1)
    for key in _LISTS:
        for number, item in enumerate(_typed(schema, key, list, where, "a list of schemas")):
            _check(item, f"{where}.{key}.{number}", depth - 1)
    for key in _MAPS:
        for name, item in _typed(schema, key, dict, where, "an object of schemas").items():
            _check(item, f"{where}.{key}.{name}", depth - 1)


def _check_plain(schema: dict[str, Any], where: str) -> None:
    given = schema.get("type", "object")
    types = given if isinstance(given, list) and given else [given]
    if not all(isinstance(name, str) and name in TYPES for name in types):
        raise _wrong(f"{where}.type", f"of {', '.join(sorted(TYPES))}", given)
    required = _typed(schema, "required", list, where, "a list of names")
    if not all(isinstance(name, str) for name in required):
        raise _wrong(f"{where}.required", "a list of names", required)
    if not _typed(schema, "enum", list, where, "a list of values") and "enum" in schema:
        raise _wrong(f"{where}.enum", "a list of at least one value", [])


def _typed(schema: dict[str, Any], key: str, kind: type[Any], where: str, allowed: str) -> Any:
    value = schema.get(key, kind())
    if not isinstance(value, kind):
        raise _wrong(f"{where}.{key}", allowed, value)
    return value


def _wrong(where: str, allowed: str, given: object) -> ApiError:
    return bad_request(f"{where} must be {allowed}, not {shorten(given)}", "tools")

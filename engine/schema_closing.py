"""Objects get no keys beside those that their schema names.

JSON Schema allows any further key unless `additionalProperties` says otherwise. Whoever lists `properties` rarely
means that, and a small model goes on adding keys until its context ends. So what is generated is narrower: an
object schema that lists `properties` and says nothing of others is closed. Whatever satisfies the closed schema
satisfies the given one.

What closing could make wrong stays open, with everything that it refers to: parts of `allOf` and `oneOf`, which
judge one object together, objects beside such keywords, and objects that need a key which they don't list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenmill.engine.schema_walk import pointer, references, resolve

OTHER_KEYS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
_OWN_RULES = (
    "properties",
    *OTHER_KEYS,
    "required",
    "minProperties",
    "dependentRequired",
    "items",
    "prefixItems",
)
_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("anyOf", "allOf", "prefixItems", "items")
DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *DEFINITIONS)


def close_objects(schema: Any) -> Any:
    """The schema with its objects closed; the given one stays as it is."""
    return _close(schema, "#", _open_places(schema))


def _close(schema: Any, place: str, kept_open: set[str]) -> Any:
    if not isinstance(schema, dict) or place in kept_open:
        return schema
    is_open = _is_open(schema)
    closing = {
        key: value
        if is_open and key not in DEFINITIONS
        else _close_inside(key, value, pointer(place, key), kept_open)
        for key, value in schema.items()
    }
    if _lists_all(schema):
        closing["additionalProperties"] = False
    return closing


def _close_inside(key: str, value: Any, place: str, kept_open: set[str]) -> Any:
    """The value of a keyword, its schemas closed."""
    if key in _MAPS and isinstance(value, dict):
        return {name: _close(item, pointer(place, name), kept_open) for name, item in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_close(item, pointer(place, number), kept_open) for number, item in enumerate(value)]
    return _close(value, place, kept_open) if key in _ONE else value


def _is_open(schema: dict[str, Any]) -> bool:
    """Whether several parts of a schema judge one object together."""
    parts = schema.get("allOf")
    several = "oneOf" in schema or (isinstance(parts, list) and len(parts) > 1)
    several = several or ("properties" in schema and "patternProperties" in schema)
    combines = any(key in schema for key in ("allOf", "anyOf", "$ref"))
    return several or (combines and any(key in schema for key in _OWN_RULES))


def _lists_all(schema: dict[str, Any]) -> bool:
    """Whether an object of this schema needs no key beside its `properties`, and may have others so far."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, dict)
        and not _is_open(schema)
        and not any(key in schema for key in (*OTHER_KEYS, "minProperties", "dependentRequired"))
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
    )


def _open_places(root: object) -> set[str]:
    """Pointers to what open places refer to, directly or through others."""
    places: set[str] = set()
    waiting = list(_open_references(root))
    while waiting:
        ref = waiting.pop()
        if ref not in places:
            places.add(ref)
            waiting += [inner for target in resolve(root, ref) for inner in references(target)]
    return places


def _open_references(schema: object) -> Iterator[str]:
    """References from open places; those of definitions that are only defined there don't count."""
    if isinstance(schema, list):
        for item in schema:
            yield from _open_references(item)
    elif isinstance(schema, dict):
        is_open = _is_open(schema)
        for key, value in schema.items():
            if is_open and key not in DEFINITIONS:
                yield from references({key: value})
            else:
                yield from _open_references(value)

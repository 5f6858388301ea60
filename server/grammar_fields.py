"""The fields that say what an answer must look like, as the one grammar that the engine enforces."""

from __future__ import annotations

from typing import Any

import msgspec

from tokenmill.engine.sampling_params import Grammar
from tokenmill.server.errors import bad_request, shorten
from tokenmill.server.protocol_sampling import SamplingFields

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
ANY_OBJECT: dict[str, Any] = {"type": "object"}
ANY_VALUE: dict[str, Any] = {}


class RequestedGrammar(msgspec.Struct, frozen=True):
    """A grammar, and the field to name when the engine can't compile it."""

    grammar: Grammar
    param: str


def requested_grammar(request: SamplingFields) -> RequestedGrammar | None:
    """What the answer must follow, or None. `ApiError` 400: two at once, or what is no schema."""
    given = [name for name in GUIDED if getattr(request, name) is not None]
    if request.response_format is not None and request.response_format.type != "text":
        given.insert(0, "response_format")
    if len(given) > 1:
        raise bad_request(
            f"{given[0]} and {given[1]} both say what the answer looks like; give one", given[1]
        )
    _check_response_format(request)
    if not given:
        return None
    return RequestedGrammar(_grammar(request, given[0]), given[0])


def _grammar(request: SamplingFields, name: str) -> Grammar:
    if name == "guided_regex":
        return Grammar("regex", str(request.guided_regex))
    if name == "guided_choice":
        return Grammar("choice", msgspec.json.encode(request.guided_choice).decode())
    if name == "guided_grammar":
        return Grammar("grammar", str(request.guided_grammar))
    if name == "guided_json":
        return schema_grammar(_schema_of(request.guided_json, name))
    assert request.response_format is not None
    if request.response_format.type == "json_object":
        return schema_grammar(ANY_OBJECT)
    named = request.response_format.json_schema
    assert named is not None
    return schema_grammar(ANY_VALUE if named.json_schema is None else named.json_schema)


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """A JSON schema as a grammar. Properties are written in the order of its keys."""
    return Grammar("json_schema", msgspec.json.encode(schema).decode())


def _schema_of(value: object, param: str) -> dict[str, Any]:
    """A schema that came as an object or as its JSON."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except RecursionError:
            raise bad_request(f"{param}: the schema is nested too deeply", param) from None
        except (msgspec.MsgspecError, ValueError) as error:
            raise bad_request(f"{param}: the text isn't valid JSON: {error}", param) from None
    if not isinstance(value, dict):
        raise bad_request(f"{param}: a JSON schema is an object, not {shorten(value)}", param)
    return value


def _check_response_format(request: SamplingFields) -> None:
    given = request.response_format
    if given is None:
        return
    if given.type == "json_schema" and given.json_schema is None:
        raise bad_request(
            "response_format: the type json_schema needs the key json_schema", "response_format"
        )
    if given.type != "json_schema" and given.json_schema is not None:
        message = f"response_format: json_schema goes with the type json_schema, not with {given.type}"
        raise bad_request(message, "response_format")

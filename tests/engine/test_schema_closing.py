"""Objects are closed where that narrows a schema, and stay open where it could make one wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from tokenmill.engine.grammar import to_llguidance
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.schema_closing import close_objects
from tokenmill.engine.schema_walk import replace_embedded

INTEGER: dict[str, Any] = {"type": "integer"}
NULL: dict[str, Any] = {"type": "null"}


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def shut(**properties: Any) -> dict[str, Any]:
    return {**obj(**properties), "additionalProperties": False}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


CLOSED = {
    "an object": (obj(a=INTEGER), shut(a=INTEGER)),
    "one without any": ({"type": "object", "properties": {}}, {**shut(), "required": None}),
    "inside another": (obj(a=obj(b=INTEGER)), shut(a=shut(b=INTEGER))),
    "items": ({"type": "array", "items": obj(a=INTEGER)}, {"type": "array", "items": shut(a=INTEGER)}),
    "a tuple": ({"prefixItems": [obj(a=NULL)]}, {"prefixItems": [shut(a=NULL)]}),
    "a map's values": (
        {"type": "object", "additionalProperties": obj(a=NULL)},
        {"type": "object", "additionalProperties": shut(a=NULL)},
    ),
    "branches of anyOf": ({"anyOf": [obj(a=NULL), NULL]}, {"anyOf": [shut(a=NULL), NULL]}),
    "an allOf of one": ({"allOf": [obj(a=NULL)]}, {"allOf": [shut(a=NULL)]}),
    "definitions": (
        {**obj(a=ref("A")), "$defs": {"A": obj(b=NULL)}},
        {**shut(a=ref("A")), "$defs": {"A": shut(b=NULL)}},
    ),
    "a recursive definition": (
        {**ref("N"), "$defs": {"N": obj(n={"anyOf": [ref("N"), NULL]})}},
        {**ref("N"), "$defs": {"N": shut(n={"anyOf": [ref("N"), NULL]})}},
    ),
}
OPEN: dict[str, dict[str, Any]] = {
    "one that says so": {**obj(a=NULL), "additionalProperties": True},
    "one with patterns": {**obj(a=NULL), "patternProperties": {"^b": NULL}},
    "one whose patterns hold for listed keys too": {
        "type": "object",
        "properties": {"ab": obj(x=NULL)},
        "patternProperties": {"^a": obj(y=NULL)},
    },
    "a free object": {"type": "object"},
    "one that needs an unlisted key": {"type": "object", "properties": {"a": NULL}, "required": ["b"]},
    "one that counts its keys": {**obj(a=NULL), "minProperties": 3},
    "parts of allOf": {"allOf": [obj(a=NULL), obj(b=NULL)]},
    "branches of oneOf": {"oneOf": [obj(a=NULL), obj(b=NULL)]},
    "one beside anyOf": {**obj(a=NULL), "anyOf": [obj(b=NULL), obj(c=NULL)]},
    "one beside a reference": {**obj(a=NULL), **ref("B"), "$defs": {"B": {"type": "object"}}},
    "what parts of allOf refer to": {
        "allOf": [ref("A"), ref("B")],
        "$defs": {"A": obj(a=ref("C")), "B": obj(b=NULL), "C": obj(c=NULL)},
    },
    "an object that only looks like a schema": {"const": {"properties": {"a": 1}}},
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed(name: str) -> None:
    given, expected = CLOSED[name]
    before = copy.deepcopy(given)
    wanted = {key: value for key, value in expected.items() if value is not None}
    assert close_objects(given) == wanted
    assert given == before


@pytest.mark.parametrize("name", OPEN)
def test_left_open(name: str) -> None:
    assert close_objects(OPEN[name]) == OPEN[name]


def test_definitions_of_an_open_schema_are_closed_where_only_closed_places_use_them() -> None:
    schema = {"oneOf": [ref("A"), NULL], "$defs": {"A": obj(a=NULL), "B": obj(b=NULL)}}
    assert close_objects(schema)["$defs"] == {"A": obj(a=NULL), "B": shut(b=NULL)}


def test_what_satisfies_the_closed_schema_satisfies_the_given_one() -> None:
    for given, _ in CLOSED.values():
        for value in (
            {"a": 1},
            {"a": None},
            {"a": {"b": 1}},
            {"a": {"b": None}},
            {"n": None},
            {},
            [{"a": 1}],
        ):
            if jsonschema.Draft202012Validator(close_objects(given)).is_valid(value):
                jsonschema.validate(value, given)


def test_order_of_properties_stays() -> None:
    assert list(close_objects(obj(z=NULL, a=NULL, m=NULL))["properties"]) == ["z", "a", "m"]


def test_the_compiler_gets_closed_schemas() -> None:
    schema = json.dumps(obj(a=INTEGER))
    assert '"additionalProperties": false' in to_llguidance(Grammar("grammar", f"start: %json {schema}\n"))
    closed = json.loads(to_llguidance(Grammar("json_schema", schema)))["grammars"][0]["json_schema"]
    assert closed["additionalProperties"] is False


def test_schemas_inside_a_lark_grammar_are_replaced() -> None:
    lark = 'start: "%json {" %json {"const": "}"} | b\nb: %json{"type": "null"}\n'
    seen: list[object] = []
    replaced = replace_embedded(lark, lambda schema: seen.append(schema) or {"n": len(seen)})
    assert seen == [{"const": "}"}, {"type": "null"}]
    assert replaced == 'start: "%json {" %json {"n": 1} | b\nb: %json{"n": 2}\n'


def test_what_is_no_json_is_left_to_the_compiler() -> None:
    broken = "start: %json {a} | %json {"
    assert replace_embedded(broken, lambda schema: None) == broken

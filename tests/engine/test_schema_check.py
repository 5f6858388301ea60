"""Schemas that nothing finite satisfies are refused; recursion that can end is not."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tokenmill.engine.grammar import GrammarError, to_llguidance
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.schema_check import check_schema, has_finite_instance

N: dict[str, Any] = {"$ref": "#/$defs/N"}
M: dict[str, Any] = {"$ref": "#/$defs/M"}
NULL: dict[str, Any] = {"type": "null"}


def obj(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object that requires all of its properties, or these."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


def recursive(definition: object, **others: object) -> dict[str, Any]:
    """A schema that is the definition N."""
    return {"$ref": "#/$defs/N", "$defs": {"N": definition, **others}}


ENDLESS = {
    "required property": recursive(obj(next=N)),
    "required among others": recursive(obj(value={"type": "integer"}, next=N)),
    "the root itself": obj(next={"$ref": "#"}),
    "a property that is itself": {**obj(["a"], a={"$ref": "#/properties/a"})},
    "only itself": recursive(N),
    "mutual": recursive(obj(m=M), M=obj(n=N)),
    "mutual through an array": recursive(obj(m=M), M={"type": "array", "items": N, "minItems": 1}),
    "array of at least one": recursive({"type": "array", "items": N, "minItems": 1}),
    "tuple": recursive({"type": "array", "prefixItems": [NULL, N], "minItems": 2}),
    "tuple of the old draft": recursive({"type": "array", "items": [NULL, N], "minItems": 2}),
    "rest of a tuple": recursive({"type": "array", "prefixItems": [NULL], "items": N, "minItems": 2}),
    "every branch": recursive({"anyOf": [obj(a=N), obj(b=N)]}),
    "one of two endless": recursive({"oneOf": [obj(a=N), obj(b=N)]}),
    "one part of allOf": recursive({"type": "object", "allOf": [obj(a=NULL), obj(b=N)]}),
    "type beside allOf": recursive(
        {"type": "object", "allOf": [{"properties": {"n": N}, "required": ["n"]}]}
    ),
    "map of at least one": recursive({"type": "object", "additionalProperties": N, "minProperties": 1}),
    "required name of a map": recursive({"type": "object", "additionalProperties": N, "required": ["x"]}),
    "names with slashes": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": obj(n={"$ref": "#/$defs/a~1b"})}},
}
ENDING = {
    "optional property": recursive(obj([], next=N)),
    "null instead": recursive(obj(next={"anyOf": [N, NULL]})),
    "null among the types": recursive({**obj(next=N), "type": ["object", "null"]}),
    "no type at all": recursive({"properties": {"next": N}, "required": ["next"]}),
    "array that may be empty": recursive(obj(children={"type": "array", "items": N})),
    "tuple that may be short": recursive({"type": "array", "prefixItems": [NULL, N], "minItems": 1}),
    "one branch ends": recursive({"oneOf": [obj(a=N), obj(b=NULL)]}),
    "mutual with an end": recursive(obj(m=M), M=obj([], n=N)),
    "a constant": recursive({"const": {"$ref": "#/$defs/N"}}),
    "a map that may be empty": recursive({"type": "object", "additionalProperties": N}),
    "enough optional properties": recursive(
        {
            "type": "object",
            "properties": {"a": NULL, "n": N},
            "additionalProperties": False,
            "minProperties": 1,
        }
    ),
    "endless but unused": {**obj(a=NULL), "$defs": {"N": obj(n=N)}},
    "endless but optional": {**obj(["a"], a=NULL, n=N), "$defs": {"N": obj(n=N)}},
    "a property of that name": obj(**{"$ref": {"type": "string"}}),
    "a reference that leads nowhere": {"$ref": "#/$defs/missing"},
    "another document's": {"$ref": "https://example.com/schema"},
    "anything": {},
    "of an unknown type": {"type": "strnig"},
    "of no type": {"type": []},
    "forbidden, which is the compiler's to say": obj(a=False),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_nothing_finite_satisfies_it(name: str) -> None:
    assert not has_finite_instance(ENDLESS[name])


@pytest.mark.parametrize("name", ENDING)
def test_something_finite_satisfies_it(name: str) -> None:
    assert has_finite_instance(ENDING[name])


@pytest.mark.parametrize("forwards", [True, False])
def test_long_chains_of_definitions(forwards: bool) -> None:
    count = 2000
    names = [f"d{number:04}" for number in range(count)]
    chain: dict[str, Any] = {
        name: obj(next={"$ref": f"#/$defs/{after}"}) for name, after in itertools.pairwise(names)
    }
    chain[names[-1]] = NULL
    order = names if forwards else names[::-1]
    schema = {"$defs": {name: chain[name] for name in order}, "$ref": f"#/$defs/{names[0]}"}
    assert has_finite_instance(schema)
    schema["$defs"][names[-1]] = {"$ref": f"#/$defs/{names[0]}"}
    assert not has_finite_instance(schema)


def test_the_compiler_refuses_them_with_a_reason() -> None:
    endless = json.dumps(ENDLESS["mutual"])
    for grammar in (Grammar("json_schema", endless), Grammar("grammar", f"start: %json {endless}\n")):
        with pytest.raises(GrammarError, match="no finite document satisfies the schema"):
            to_llguidance(grammar)


def test_tuples_of_two_drafts_are_refused() -> None:
    with pytest.raises(ValueError, match="prefixItems"):
        check_schema(obj(a={"prefixItems": [NULL], "additionalItems": False}))


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.engine.schema_check.MAX_STEPS", 3)
    assert has_finite_instance(ENDLESS["mutual"]), "what can't be followed counts as finite"

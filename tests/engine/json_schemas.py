"""JSON schemas of the kinds that clients send: a table by hand, a generator, and those that must be refused."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

LETTER: Schema = {"type": "string", "pattern": "^[a-z]$"}
SHORT: Schema = {"type": "string", "maxLength": 4}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}


def record(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """A closed object."""
    names = list(properties) if required is None else required
    closed = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return {**closed, **more}


def array(items: Any, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": most, **more}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


VALUES: list[Schema] = [
    {},
    {"type": "null"},
    {"type": "boolean"},
    {"const": 1.0},
    {"const": {"a": [1, 2, None], "b": {"c": "d"}}},
    {"enum": [1, "a", None, {"x": 1}, [2]]},
    {"enum": ['é\n"\\/', "水車", "\t"]},
    {"type": "string", "enum": ["oat", "oats", "o"]},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": ["integer", "boolean"], "minimum": 5, "maximum": 6},
    {"minimum": 3, "maxLength": 2, "maxItems": 1},
    {"title": "Mill", "description": "no more than words", "default": 1, "examples": [1], "type": "integer"},
]
NUMBERS: list[Schema] = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": -3, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": -1},
    {"type": "integer", "minimum": 1000, "maximum": 1010},
    {"type": "integer", "minimum": 98},
    {"type": "integer", "maximum": -7},
    {"type": "integer", "multipleOf": 7, "minimum": 3, "maximum": 50},
    {"type": "integer", "multipleOf": 12},
    {"type": "integer", "minimum": 1.5, "maximum": 2.5},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25},
    {"type": "number", "minimum": 0.125, "maximum": 0.25},
    {"type": "number", "multipleOf": 0.25, "minimum": -3, "maximum": 7},
    {"type": "number", "minimum": -1000000, "exclusiveMaximum": 0},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"anyOf": [{"type": "integer", "maximum": 2}, {"type": "integer", "minimum": 8}]},
]
STRINGS: list[Schema] = [
    {"type": "string"},
    SHORT,
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 2, "maxLength": 2},
    {"type": "string", "minLength": 5, "maxLength": 9},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "pattern": "^(oat|rye)-[0-9]{1,3}$"},
    {"type": "string", "pattern": "^[0-9]+$", "maxLength": 3},
    {"type": "string", "pattern": "^\\d{3}-\\w$"},
    {"type": "string", "pattern": "^[A-ZÄÖÜ水]{1,3}$"},
    {"type": "string", "pattern": '^["\\\\]{1,3}$'},
    {"type": "string", "pattern": "^a", "maxLength": 6},
    {"type": "string", "pattern": "z$", "maxLength": 6},
    {"type": "string", "pattern": "", "maxLength": 2},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date", "pattern": "^2"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "email"},
]
ARRAYS: list[Schema] = [
    {"type": "array"},
    {"type": "array", "maxItems": 0},
    array(DIGIT),
    array(DIGIT, 4, minItems=4),
    array(SHORT, 2, minItems=1),
    array(array(DIGIT, 2), 2, minItems=1),
    array(either(DIGIT, {"type": "null"}), 5),
    {"type": "array", "prefixItems": [LETTER, DIGIT], "items": False},
    {"type": "array", "prefixItems": [LETTER, DIGIT], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [LETTER], "items": DIGIT, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [LETTER, DIGIT, {"type": "null"}], "maxItems": 2},
    {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 5},
    array(record({"id": DIGIT}), 2, minItems=1),
]
OBJECTS: list[Schema] = [
    {"type": "object"},
    record({}),
    record({"a": DIGIT}),
    record({"a": DIGIT, "b": LETTER, "c": {"type": "null"}}, ["b"]),
    record({"a": DIGIT, "b": LETTER}, []),
    record({"a": DIGIT, "b": {"type": "null"}}, [], minProperties=1),
    record({"a": DIGIT, "b": {"type": "null"}}, [], maxProperties=1),
    record({'we"ird\n': DIGIT, "水": LETTER, "": {"type": "null"}}),
    record({"address": record({"street": SHORT, "lines": array(SHORT, 2)}), "kind": {"const": "mill"}}),
    record({"one": record({"two": record({"three": record({"four": DIGIT})})})}),
    {"type": "object", "properties": {"a": DIGIT}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "additionalProperties": DIGIT, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a[a-z]{0,2}$": DIGIT}, "additionalProperties": False},
    {"type": "object", "properties": {"a": DIGIT}, "required": ["a", "b"]},
    {"allOf": [record({"a": DIGIT, "b": LETTER}, []), {"required": ["a"]}]},
    {"type": "object", "properties": {"no": False, "yes": True}, "additionalProperties": False},
]
CHOICES: list[Schema] = [
    either(LETTER, DIGIT),
    either(record({"kind": {"const": "a"}, "x": DIGIT}), record({"kind": {"const": "b"}, "y": LETTER})),
    either(record({"a": DIGIT}), array(DIGIT), {"type": "null"}),
    {"oneOf": [{"type": "string", "maxLength": 1}, DIGIT]},
    {"oneOf": [array(DIGIT, 2), record({"a": DIGIT}), {"type": "boolean"}]},
    either(SHORT, either(DIGIT, {"type": "null"})),
    record({"value": either(DIGIT, {"type": "null"}), "note": {"type": ["string", "null"], "maxLength": 3}}),
]
NODE = record({"v": {"type": "boolean"}, "children": array({"$ref": "#/$defs/node"}, 2)}, ["v"])
REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/x", "$defs": {"x": DIGIT}},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "string"}}, "maxLength": 2},
    {"$ref": "#/definitions/x", "definitions": {"x": LETTER}},
    {"$ref": "#named", "$defs": {"x": {"$anchor": "named", **LETTER}}},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": DIGIT}},
    {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/y"}, "y": LETTER}},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    record({"v": DIGIT, "next": either({"type": "null"}, {"$ref": "#"})}),
    record({"left": {"$ref": "#"}, "right": {"$ref": "#"}}, []),
    array({"$ref": "#"}, 2),
    record({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}}, **{"$defs": {"p": array(DIGIT, 2)}}),
    record({"a": DIGIT, "b": {"$ref": "#/properties/a"}}),
    either({"$ref": "#/$defs/even"}, DIGIT)
    | {
        "$defs": {
            "even": array({"$ref": "#/$defs/odd"}, 1),
            "odd": record({"e": either(DIGIT, {"$ref": "#/$defs/even"})}),
        }
    },
]
BY_HAND = [*VALUES, *NUMBERS, *STRINGS, *ARRAYS, *OBJECTS, *CHOICES, *REFERENCES]

REFUSED: dict[str, tuple[Schema | bool, str]] = {
    "uniqueItems": (array(DIGIT, uniqueItems=True), "uniqueItems"),
    "not": ({"type": "string", "not": {"const": "a"}}, "not"),
    "oneOf that overlaps": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    "if": ({"if": {"type": "string"}, "then": {"maxLength": 2}}, "if"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "dependentSchemas": ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
    "dependencies": ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    "contains": ({"type": "array", "contains": {"const": 1}, "minContains": 2}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "unevaluatedItems": ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    "$dynamicRef": ({"$dynamicRef": "#x"}, "dynamicRef"),
    "unknown format": ({"type": "string", "format": "flour"}, "flour"),
    "format regex": ({"type": "string", "format": "regex"}, "regex"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "backreference": ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
    "pattern cut short": ({"type": "string", "pattern": "[a"}, "regex"),
    "multipleOf 0": ({"type": "integer", "multipleOf": 0}, "multiple"),
    "no number between": ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
    "no length between": ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    "no string between": ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    "empty enum": ({"enum": []}, "Unsatisfiable"),
    "enum of another type": ({"type": "integer", "enum": ["a"]}, "Unsatisfiable"),
    "allOf at odds": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
    "required but false": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "required"),
    "false": (False, "Expecting object"),
    "missing definition": ({"$ref": "#/$defs/x"}, "/$defs/x"),
    "remote reference": ({"$ref": "https://example.com/x.json"}, "example.com"),
    "reference to itself": (
        {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}},
        "no finite document",
    ),
    "unknown type": ({"type": "strnig"}, "strnig"),
    "properties as a list": ({"type": "object", "properties": []}, "properties"),
    "required as a string": ({"type": "object", "required": "a"}, "required"),
    "bound as a string": ({"type": "integer", "minimum": "1"}, "minimum"),
    "negative length": ({"type": "string", "minLength": -1}, "minLength"),
    "two drafts' tuples": (
        {"type": "array", "prefixItems": [LETTER], "additionalItems": False},
        "prefixItems",
    ),
}
"""Schemas that can't be enforced or satisfied, and a word that the reason must hold."""


def generated(seed: int) -> Schema:
    """A nested schema; the same for the same seed."""
    schema = _Generator(random.Random(seed)).schema(depth=3)
    return schema


class _Generator:
    def __init__(self, source: random.Random) -> None:
        self._random = source

    def schema(self, depth: int) -> Schema:
        kinds = (
            [self._leaf]
            if depth == 0
            else [self._leaf, self._record, self._record, self._array, self._either]
        )
        if depth == 3:
            kinds = kinds[1:]
        return self._random.choice(kinds)(depth)

    def _leaf(self, _: int) -> Schema:
        pick = self._random
        return pick.choice([self._integer, self._number, self._string, self._enum])()

    def _integer(self) -> Schema:
        low = self._random.randrange(-200, 200)
        schema: Schema = {"type": "integer", "minimum": low, "maximum": low + self._random.randrange(30)}
        if self._random.random() < 0.2:
            schema = {"type": "integer", "minimum": low, "maximum": low + 20, "multipleOf": 5}
        return schema

    def _number(self) -> Schema:
        low = self._random.randrange(-40, 40) / 8
        names = self._random.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": "number", names[0]: low, names[1]: low + self._random.randrange(1, 30) / 4}

    def _string(self) -> Schema:
        least = self._random.randrange(3)
        bounded = {"type": "string", "minLength": least, "maxLength": least + self._random.randrange(6)}
        pattern = self._random.choice(["^[a-f]{1,4}$", "^(x|yz)+$", "^[0-9]{2}:[0-9]{2}$", "^\\S{1,3}$"])
        formatted = {"type": "string", "format": self._random.choice(["date", "ipv4", "uuid"])}
        return self._random.choice([bounded, {"type": "string", "pattern": pattern}, formatted])

    def _enum(self) -> Schema:
        values = [0, -1.5, "a", "", "水", None, True, [], {"k": 1}]
        return {"enum": self._random.sample(values, self._random.randrange(1, 4))}

    def _record(self, depth: int) -> Schema:
        names = self._random.sample(
            ["id", "name", "sacks", "größe", "x y", "tags", "meta"], self._random.randrange(1, 4)
        )
        properties = {name: self.schema(depth - 1) for name in names}
        required = [name for name in names if self._random.random() < 0.6]
        return record(properties, required)

    def _array(self, depth: int) -> Schema:
        least = self._random.randrange(3)
        most = least + self._random.randrange(3)
        if self._random.random() < 0.3:
            first = [self.schema(depth - 1) for _ in range(2)]
            return {"type": "array", "prefixItems": first, "items": False, "minItems": min(least, 2)}
        return array(self.schema(depth - 1), most, minItems=least)

    def _either(self, depth: int) -> Schema:
        return either(*[self.schema(depth - 1) for _ in range(self._random.randrange(2, 4))])

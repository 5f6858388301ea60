"""What a JSON schema must be before a grammar is made of it: satisfiable by something finite, and of one draft.

A grammar happily compiles a schema in which every object requires another of its kind. Nothing finite satisfies
it, so the text under it would end with the context and never be JSON. Whether a definition has a finite
instance is a least fixpoint: none has at first, and one gains it when all that it requires has it.

    N = {"required": ["next"], "properties": {"next": N}}                never: each N needs another
    N = {"required": ["next"], "properties": {"next": N or null}}        in the first round: null ends it

The check is sound, not complete: what it can't follow counts as finite, so no satisfiable schema is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenmill.engine.schema_walk import PLAIN_VALUES, references, resolve

TYPES = frozenset(["object", "array", "string", "number", "integer", "boolean", "null"])
SCALARS = TYPES - {"object", "array"}
MAX_STEPS = 500_000
"""Schemas looked at, again and again, after which the rest counts as finite: about a second."""


def check_schema(schema: object) -> None:
    """Refuse (`ValueError`) what no finite document satisfies, and tuples of two drafts in one."""
    _check_tuples(schema)
    if not has_finite_instance(schema):
        raise ValueError("no finite document satisfies the schema: it requires itself at each level")


def has_finite_instance(schema: object) -> bool:
    """Whether some finite document can satisfy a schema, as far as its references to itself decide it."""
    targets = {ref: found[0] for ref in references(schema) if (found := resolve(schema, ref))}
    # Definitions mostly stand in the order of their use, or in its reverse.
    order = list(targets)
    known = _Finite(targets)
    while True:
        order.reverse()
        news = [ref for ref in order if known.learn(ref)]
        if not news or known.steps > MAX_STEPS:
            return known.holds(schema, TYPES)


class _Finite:
    """What is known to have a finite instance: references, and what needs no other."""

    def __init__(self, targets: Mapping[str, object]) -> None:
        self.steps = 0
        self._targets = targets
        self._finite: set[str] = set()

    def learn(self, ref: str) -> bool:
        """Whether the target of this reference turns out to have an instance now."""
        if ref in self._finite or not self.holds(self._targets[ref], TYPES):
            return False
        self._finite.add(ref)
        return True

    def holds(self, schema: object, types: frozenset[str]) -> bool:
        """Whether a schema has a finite instance of one of these types: each of its keywords must have one."""
        self.steps += 1
        # What `false` forbids never matters for an end; the compiler names it.
        if not isinstance(schema, dict) or self.steps > MAX_STEPS:
            return True
        if "const" in schema or "enum" in schema:
            return True
        types = types & _types(schema)
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref in self._targets and ref not in self._finite:
            return False
        for key, whole in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            parts = schema.get(key)
            if isinstance(parts, list) and not whole(self.holds(part, types) for part in parts):
                return False
        return (
            bool(types & SCALARS)
            or ("object" in types and self._object(schema))
            or ("array" in types and self._array(schema))
        )

    def _object(self, schema: dict[str, Any]) -> bool:
        properties, others = _map(schema.get("properties")), schema.get("additionalProperties", True)
        patterns = _map(schema.get("patternProperties"))
        for name in _list(schema.get("required")):
            own = properties.get(name, True if patterns else others) if isinstance(name, str) else True
            if not self.holds(own, TYPES):
                return False
        least = schema.get("minProperties", 0)
        if not isinstance(least, int) or least <= 0:
            return True
        if any(self.holds(other, TYPES) for other in (others, *patterns.values())):
            return True
        return sum(self.holds(own, TYPES) for own in properties.values()) >= least

    def _array(self, schema: dict[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        if not isinstance(least, int) or least <= 0:
            return True
        items = schema.get("items", True)
        first, others = _list(schema.get("prefixItems")), items
        if isinstance(items, list):
            first, others = items, schema.get("additionalItems", True)
        needed = first[:least] if len(first) >= least else [*first, others]
        return all(self.holds(item, TYPES) for item in needed)


def _types(schema: dict[str, Any]) -> frozenset[str]:
    """The types that a schema allows; one that isn't a type is the compiler's to refuse."""
    given = schema.get("type")
    names = given if isinstance(given, list) else [given]
    known = frozenset(name for name in names if isinstance(name, str)) & TYPES
    return known if known and len(known) == len(names) else TYPES


def _map(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_tuples(schema: object) -> None:
    """Refuse tuples of two drafts in one: llguidance would pass over `prefixItems` beside `additionalItems`."""
    if isinstance(schema, dict):
        if isinstance(schema.get("prefixItems"), list) and "additionalItems" in schema:
            raise ValueError("prefixItems doesn't go with additionalItems; use items")
        for key, value in schema.items():
            if key not in PLAIN_VALUES:
                _check_tuples(value)
    elif isinstance(schema, list):
        for item in schema:
            _check_tuples(item)

"""Getting around in a JSON schema: what it refers to, and what its pointers point at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

PLAIN_VALUES = ("const", "enum", "default", "examples")
"""Keys whose values are JSON values and no schemas."""

_EMBEDDED = re.compile(r"%json\s*(?=\{)")


def references(schema: object) -> Iterator[str]:
    """Every `$ref` in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for key, value in schema.items():
            if key not in PLAIN_VALUES:
                yield from references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from references(item)


def resolve(root: object, ref: str) -> list[Any]:
    """What a JSON pointer (`#/…`) within the document points at, in a list; nothing for other references."""
    if ref != "#" and not ref.startswith("#/"):
        return []
    found = root
    for part in ref.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return []
    return [found]


def pointer(base: str, *names: str | int) -> str:
    """The pointer to what lies behind these keys and places."""
    parts = [str(name).replace("~", "~0").replace("/", "~1") for name in names]
    return "/".join([base, *parts])


def replace_embedded(lark: str, replace: Callable[[Any], object]) -> str:
    """A Lark grammar with each schema behind `%json` replaced; what isn't JSON is left to the compiler."""
    decoder = json.JSONDecoder()
    pieces, position = [], 0
    for match in _EMBEDDED.finditer(lark):
        if match.end() < position:
            continue
        try:
            schema, end = decoder.raw_decode(lark, match.end())
        except ValueError:
            continue
        pieces += [lark[position : match.end()], json.dumps(replace(schema), ensure_ascii=False)]
        position = end
    return "".join([*pieces, lark[position:]])

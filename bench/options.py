"""What the commands' options have in common: how a value is read, and how a wrong one is refused."""

from __future__ import annotations

import argparse
import json


class BenchError(Exception):
    """A measurement that can't be made; the message is one line for people."""


def integers(text: str) -> list[int]:
    """`1,8,32` as an argparse type: positive numbers, ascending, each once."""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 1,8,32") from None
    if values[0] < 1:
        raise argparse.ArgumentTypeError("each number must be at least 1")
    return values


def positive(text: str) -> int:
    """A whole number above 0, as an argparse type."""
    return integers(text)[-1]


def json_object(option: str, text: str) -> dict[str, object]:
    """The JSON object that was given as `option`. Raises `BenchError` for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BenchError(f"{option} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BenchError(f"{option} must be a JSON object")
    return value

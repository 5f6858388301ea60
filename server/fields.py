"""Field types that JSON's own don't give: unions decided on the JSON type, with one clear error each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, cast

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from tokenmill.server.errors import shorten

MAX_TOKEN_ID = (1 << 31) - 1
MAX_STOP_LENGTH = 1024
MAX_VOICE_NAME = 64
MAX_TIMEOUT_S = 7 * 24 * 3600.0
"""Longer deadlines are kept at this: a week is as good as none."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")


def refused(message: str) -> PydanticCustomError:
    """A validation error with a message of our own."""
    return PydanticCustomError("refused", "{text}", {"text": message})


def _field(validate: Callable[[Any], Any], schema: dict[str, Any]) -> Any:
    return PlainValidator(validate, json_schema_input_type=Any), WithJsonSchema(schema)


def is_token_id(value: object) -> bool:
    """Whether a JSON value may be a token id: an integer, not a bool, that fits 31 bits."""
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _check_ids(ids: list[object]) -> list[int]:
    for token in ids:
        if not is_token_id(token):
            raise refused(f"token ids must be integers from 0 to {MAX_TOKEN_ID}, not {shorten(token)}")
    return cast(list[int], ids)


def _prompt(value: object) -> list[str] | list[list[int]]:
    """A list of prompts, all texts or all token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise refused(f"must be a string, a list of strings, or a list of token ids, not {shorten(value)}")
    if not value:
        raise refused("must not be an empty list")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) for item in value):
        if not all(value):
            raise refused("must not hold an empty list of token ids")
        return [_check_ids(item) for item in value]
    if any(isinstance(item, str | list) for item in value):
        raise refused("must not mix strings, token ids and lists")
    return [_check_ids(value)]


def _stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refused(f"must be a string or a list of strings, not {shorten(value)}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise refused(f"each stop must have 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}")
    return stops


def _logprobs(value: object) -> bool | int:
    if isinstance(value, bool):
        return value
    if type(value) is not int or not 0 <= value <= 20:
        raise refused(f"must be true, false or an integer from 0 to 20, not {shorten(value)}")
    return value


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise refused(f"must be an object of token ids and numbers, not {shorten(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not _INTEGER.fullmatch(key) or not is_token_id(int(key)):
            raise refused(f"the key {shorten(key)} is no token id (an integer from 0, written as a string)")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise refused(f"the bias of token {key} must be a number from -100 to 100, not {shorten(bias)}")
        biases[int(key)] = float(bias)
    return biases


def _timeout(value: object) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise refused(f"must be a number of seconds above 0, not {shorten(value)}")
    seconds = min(value, MAX_TIMEOUT_S)
    if not math.isfinite(seconds):
        raise refused("must be finite")
    return float(seconds)


def _voice(value: object) -> str:
    """A voice's name, given as such or as OpenAI's object with an `id`."""
    name = value.get("id") if isinstance(value, dict) and set(value) == {"id"} else value
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_VOICE_NAME:
        raise refused(
            f"must be a voice's name of 1 to {MAX_VOICE_NAME} characters, or an object with it as `id`, "
            f"not {shorten(value)}"
        )
    return name


_ID = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}

Prompt = Annotated[
    list[str] | list[list[int]],
    *_field(
        _prompt,
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": _ID, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": _ID, "minItems": 1}, "minItems": 1},
            ]
        },
    ),
]
Stop = Annotated[
    list[str], *_field(_stop, {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]})
]
Logprobs = Annotated[
    bool | int,
    *_field(_logprobs, {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 20}]}),
]
LogitBias = Annotated[
    dict[int, float],
    *_field(
        _logit_bias,
        {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]*)$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
    ),
]
_VOICE = {"type": "string", "minLength": 1, "maxLength": MAX_VOICE_NAME}
VoiceName = Annotated[
    str,
    *_field(
        _voice,
        {
            "anyOf": [
                _VOICE,
                {
                    "type": "object",
                    "properties": {"id": _VOICE},
                    "required": ["id"],
                    "additionalProperties": False,
                },
            ]
        },
    ),
]
Timeout = Annotated[
    float,
    *_field(
        _timeout,
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
            ]
        },
    ),
]

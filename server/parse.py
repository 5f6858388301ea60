"""A body becomes a `CompletionRequest`: parameters merged, names and conflicts checked, the rest refused."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tokenmill.server.body import decode_object, without_nulls
from tokenmill.server.errors import SHOWN, ApiError, bad_request, shorten
from tokenmill.server.grammar_fields import requested_grammar
from tokenmill.server.protocol import CompletionRequest

logger = logging.getLogger(__name__)
Request = TypeVar("Request", bound=BaseModel)

EXTRA_PARAMS = ("inference_extra_params", "extra_body")
ALIASES = {
    "max_tokens": ("max_tokens", "max_completion_tokens", "max_new_tokens"),
    "stop": ("stop", "stop_sequences"),
    "inference_timeout": ("inference_timeout", "timeout"),
    "inference_extra_headers": ("inference_extra_headers", "extra_headers"),
}
FORBIDDEN_HEADERS = frozenset(
    ["authorization", "x-api-key", "cookie", "host", "content-length", "transfer-encoding"]
)


def parse_completion(body: bytes, warn_unknown: bool = False) -> CompletionRequest:
    """The checked request of a body. Raises `ApiError` 400."""
    return check_completion(merge_extra_params(decode_object(body)), warn_unknown)


def check_completion(values: dict[str, Any], warn_unknown: bool = False) -> CompletionRequest:
    """The checked request of the object that a body holds. Raises `ApiError` 400."""
    request = validated(values, CompletionRequest, warn_unknown)
    check_conflicts(request)
    check_speech(request)
    return request


def validated(values: dict[str, Any], model: type[Request], warn_unknown: bool = False) -> Request:
    """The values as a request of this kind, each field checked by itself. Raises `ApiError` 400."""
    drop_inner_nulls(values)
    if warn_unknown:
        known = model.model_fields
        for name in [name for name in values if name not in known]:
            logger.warning("unknown parameter %s is ignored", shorten(name))
            del values[name]
    merge_aliases(values)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise describe(error, model) from None


def drop_inner_nulls(values: dict[str, Any]) -> None:
    """Null means "not given" inside these objects too."""
    for name in ("stream_options", "response_format", "prediction", "audio"):
        if isinstance(values.get(name), dict):
            values[name] = without_nulls(values[name])
    given = values.get("response_format")
    if isinstance(given, dict) and isinstance(given.get("json_schema"), dict):
        values["response_format"] = {**given, "json_schema": without_nulls(given["json_schema"])}


def merge_extra_params(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of `inference_extra_params` and `extra_body` as if they stood at the top."""
    for name in EXTRA_PARAMS:
        extra = values.pop(name, None)
        if extra is None:
            continue
        if not isinstance(extra, dict):
            raise bad_request(f"{name} must be an object, not {shorten(extra)}", name)
        for key, value in without_nulls(extra).items():
            if key in EXTRA_PARAMS:
                raise bad_request(f"{name} can't hold another {key}", name)
            if key in values and not _same(values[key], value):
                raise bad_request(
                    f"{key} is given twice, at the top and in {name}, with different values", key
                )
            values[key] = value
    return values


def merge_aliases(values: dict[str, Any]) -> None:
    """Names that mean the same are one; two of them with different values are refused.

    A value stays under the name that it came with where that is the only one, so that errors name it.
    """
    for names in ALIASES.values():
        given = [name for name in names if name in values]
        for other in given[1:]:
            if not _same(values[given[0]], values[other]):
                raise bad_request(f"{given[0]} and {other} mean the same and differ; give one of them", other)
            del values[other]


def _same(left: object, right: object) -> bool:
    """Equality of JSON values: `true` isn't 1."""
    return type(left) is type(right) and left == right


def name_of(request: CompletionRequest, field: str) -> str | None:
    """Under which of its names a field came, or None."""
    return next((name for name in ALIASES[field] if getattr(request, name) is not None), None)


def first_of(request: CompletionRequest, field: str) -> Any:
    """The value of a field under whichever of its names it came, or None."""
    name = name_of(request, field)
    return None if name is None else getattr(request, name)


def describe(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing that is wrong, in one sentence: which field, what is allowed, what was given."""
    first = error.errors(include_url=False)[0]
    kind, given = first["type"], first.get("input")
    # Unions name their branch by its type, which means nothing to a client.
    path = [str(part) for part in first["loc"] if kind == "extra_forbidden" or "[" not in str(part)]
    param = path[0] if path else None
    where = ".".join(path)
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], list(model.model_fields), 1) if len(path) == 1 else []
        hint = f"; did you mean {close[0]}?" if close else ""
        return bad_request(f"unknown parameter {shorten(where)}{hint}", where[:SHOWN], "unknown_parameter")
    if kind == "missing":
        return bad_request(f"{where} is required", param, "missing_parameter")
    if kind == "refused":
        return bad_request(f"{where}: {first['msg']}", param)
    allowed = _range(model.model_fields.get(where)) if kind in _BOUNDS else None
    allowed = allowed or _allowed(kind, first.get("ctx", {})) or first["msg"]
    return bad_request(f"{where} must be {allowed}, not {shorten(given)}", param)


_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "greater_than": "above {gt}",
    "less_than": "below {lt}",
}
_OTHERS = {
    "literal_error": "one of {expected}",
    "string_too_long": "at most {max_length} characters long",
    "string_too_short": "of length {min_length} or more",
    "too_long": "at most {max_length} items long",
    "too_short": "of length {min_length} or more",
}


def _allowed(kind: str, context: Mapping[str, Any]) -> str | None:
    """pydantic's error types in our words."""
    template = _TYPES.get(kind) or _BOUNDS.get(kind) or _OTHERS.get(kind)
    return template and template.format(**context)


def _range(field: FieldInfo | None) -> str | None:
    """All bounds of a number field, not only the one that was hit."""
    bounds = [
        f"{word} {_number(getattr(bound, name))}"
        for bound in (field.metadata if field is not None else ())
        for name, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
        if hasattr(bound, name)
    ]
    return " and ".join(bounds) or None


def _number(bound: float) -> str:
    """A bound to the last digit, 2**63 included, which `g` alone would round."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def check_conflicts(request: CompletionRequest) -> None:
    """What two fields together can't mean. Raises `ApiError` 400."""
    if request.best_of is not None and request.best_of < request.n:
        raise bad_request(f"best_of must be at least n ({request.n}), not {request.best_of}", "best_of")
    if request.stream and request.candidates > request.n:
        raise bad_request("best_of above n can't be streamed: the best is known at the end only", "best_of")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    given = request.model_fields_set
    if request.return_token_log_probs and "logprobs" in given and request.logprobs is not True:
        raise bad_request("return_token_log_probs means logprobs: true, which has another value", "logprobs")
    if request.top_logprobs and not request.chat_logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    requested_grammar(request)
    if request.suffix and request.echo and request.alternatives is not None:
        message = "echo with logprobs can't be given with a suffix: the model doesn't read them in that order"
        raise bad_request(message, "echo")
    for name in first_of(request, "inference_extra_headers") or {}:
        if name.lower() in FORBIDDEN_HEADERS:
            param = name_of(request, "inference_extra_headers")
            raise bad_request(
                f"{param}: {shorten(name)} concerns access or framing and can't be set here", param
            )


def check_speech(request: CompletionRequest) -> None:
    """What can't be spoken, whichever model it is. Raises `ApiError` 400."""
    if request.modalities is not None and "text" not in request.modalities:
        message = 'modalities: sound comes with the text that it speaks; say ["text", "audio"]'
        raise bad_request(message, "modalities", "unsupported_modality")
    if not request.speaks:
        if request.audio is not None:
            raise bad_request('audio needs modalities: ["text", "audio"]', "audio")
        return
    wanted = None if request.audio is None else request.audio.format
    if request.stream and wanted not in (None, "pcm16"):
        raise bad_request(f"audio: a stream is spoken as pcm16, not as {wanted}, which needs an end", "audio")
    if request.echo:
        raise bad_request("echo: the prompt isn't spoken; leave it out or ask for text alone", "echo")

"""Whether a model can do what a request asks for, and the request in the engine's terms."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.config_file import SAMPLING_KEYS
from tokenmill.server.errors import ApiError, bad_request, shorten
from tokenmill.server.model import Engine
from tokenmill.server.parse import ALIASES, first_of
from tokenmill.server.plan import Variant
from tokenmill.server.protocol import INT31, MAX_TOKENS_DEFAULT, CompletionRequest

INLINE_CHARACTERS = 20_000
"""Longer prompts are encoded beside the event loop, so that streams don't wait for them."""


class PromptInput(msgspec.Struct, frozen=True):
    """One prompt: its token ids, and its text where it came as text and all of it is used."""

    ids: list[int]
    text: str | None = None


class Job(msgspec.Struct, frozen=True):
    """A request that can be handed to the engine as it is."""

    prompts: list[PromptInput]
    params: SamplingParams
    priority: int
    cache_salt: str


def check_limits(request: CompletionRequest, variant: Variant) -> None:
    """The entry's own bounds; nothing here needs the model to be loaded. Raises `ApiError` 400."""
    limits = variant.limits
    bounds = [
        ("stop", len(first_of(request, "stop") or ()), limits.max_stop),
        ("n", request.n, limits.max_n),
        ("best_of", request.candidates, limits.max_best_of),
        ("logprobs", 0 if request.chat_logprobs else request.alternatives or 0, limits.max_logprobs),
        ("top_logprobs", request.top_logprobs, limits.max_logprobs),
        ("prompt_logprobs", request.prompt_logprobs or 0, limits.max_logprobs),
    ]
    for param, given, allowed in bounds:
        if given > allowed:
            raise bad_request(f"{param}: {given} is over this model's limit of {allowed}", param)
    sequences = len(request.prompt) * request.candidates
    if sequences > limits.max_prompts:
        asked = f"{len(request.prompt)} prompts with {request.candidates} candidates each"
        raise bad_request(f"{asked} are over this model's limit of {limits.max_prompts} sequences", "prompt")


def sampling_values(request: CompletionRequest, variant: Variant) -> dict[str, Any]:
    """Sampling settings by precedence: forced, given, the variant's default. Raises `ApiError` 400."""
    values: dict[str, Any] = {}
    for key in SAMPLING_KEYS:
        names = ALIASES.get(key, (key,))
        given = next((name for name in names if name in request.model_fields_set), None)
        if given is not None:
            values[key] = getattr(request, given)
        if key in variant.force:
            forced = variant.force[key]
            if given is not None and values[key] != forced:
                raise bad_request(f"{given} is fixed at {shorten(forced)} by {variant.name}", given)
            values[key] = forced
        elif given is None and key in variant.sampling:
            values[key] = variant.sampling[key]
    values.setdefault("max_tokens", MAX_TOKENS_DEFAULT)
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return values


def sampling_params(request: CompletionRequest, variant: Variant, engine: Engine) -> SamplingParams:
    """The settings of a request for the engine. Raises `ApiError` 400."""
    values = sampling_values(request, variant)
    width = engine.ready.logits_width
    for token in values.get("logit_bias", ()):
        if token >= width:
            raise bad_request(
                f"logit_bias: token {token} is outside the model's {width} logits", "logit_bias"
            )
    for token in values["stop_token_ids"]:
        if token >= width:
            raise bad_request(
                f"stop_token_ids: {token} is outside the model's {width} logits", "stop_token_ids"
            )
    if values.get("min_tokens", 0) > values["max_tokens"]:
        given = f"min_tokens must be at most max_tokens ({values['max_tokens']}), not {values['min_tokens']}"
        raise bad_request(given, "min_tokens")
    logprobs = request.alternatives
    if logprobs is None and request.candidates > request.n:
        logprobs = 0
    echoed = request.alternatives if request.echo else None
    prompt_logprobs = max((k for k in (echoed, request.prompt_logprobs) if k is not None), default=None)
    try:
        return SamplingParams(
            n=request.n,
            best_of=request.best_of,
            include_stop=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **values,
        )
    except ValueError as error:
        raise bad_request(str(error)) from None


async def make_job(
    request: CompletionRequest, variant: Variant, engine: Engine, headers: Mapping[str, str], cache_salt: str
) -> Job:
    """Prompts as token ids that fit the model, with their settings. Raises `ApiError` 400."""
    params = sampling_params(request, variant, engine)
    prompts = await _encode(request, engine)
    for prompt in prompts:
        _check_prompt(prompt.ids, params.max_tokens, engine)
    return Job(prompts, params, _priority(request, headers), cache_salt)


async def _encode(request: CompletionRequest, engine: Engine) -> list[PromptInput]:
    keep = request.truncate_prompt_tokens
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    if not texts:
        lists = [prompt for prompt in request.prompt if isinstance(prompt, list)]
        return [PromptInput(ids[-keep:] if keep is not None else ids) for ids in lists]
    tokenizer = engine.tokenizer
    size = sum(map(len, texts))
    if size <= INLINE_CHARACTERS:
        encoded = tokenizer.encode_batch(texts, request.add_special_tokens)
    else:
        if keep is None:
            _check_length(texts, engine)
        encoded = await asyncio.to_thread(tokenizer.encode_batch, texts, request.add_special_tokens)
    prompts = []
    for text, ids in zip(texts, encoded, strict=True):
        ids = ids or [_start_token(tokenizer)]
        cut = keep is not None and len(ids) > keep
        prompts.append(PromptInput(ids[-keep:] if keep and cut else ids, None if cut else text))
    return prompts


def _check_length(texts: list[str], engine: Engine) -> None:
    """Refuse a text that can't fit before spending time on encoding it."""
    for text in texts:
        least = len(text) // engine.tokenizer.longest_token
        if least > engine.context:
            raise _too_long(f"your prompt has at least {least}", "prompt", engine)


def _start_token(tokenizer: Tokenizer) -> int:
    """What an empty prompt starts from."""
    info = tokenizer.info
    if info.bos_id is not None:
        return info.bos_id
    if info.eos_ids:
        return info.eos_ids[0]
    raise bad_request("prompt is empty, and this model has no token to start from", "prompt")


def _check_prompt(ids: list[int], max_tokens: int, engine: Engine) -> None:
    width = engine.ready.logits_width
    if max(ids) >= width:
        wrong = next(token for token in ids if token >= width)
        raise bad_request(f"prompt: token {wrong} is outside the model's vocabulary of {width}", "prompt")
    if len(ids) + max_tokens > engine.context:
        param = "prompt" if len(ids) >= engine.context else "max_tokens"
        parts = f"{len(ids)} in the prompt, {max_tokens} for the completion"
        raise _too_long(f"you asked for {len(ids) + max_tokens} ({parts})", param, engine)


def _too_long(asked: str, param: str, engine: Engine) -> ApiError:
    message = f"This model's maximum context length is {engine.context} tokens, but {asked}"
    return bad_request(message, param, "context_length_exceeded")


def _priority(request: CompletionRequest, headers: Mapping[str, str]) -> int:
    if request.priority is not None:
        return request.priority
    given = headers.get("x-priority")
    if given is None:
        return 0
    try:
        priority = int(given)
    except ValueError:
        priority = INT31
    if not -INT31 <= priority < INT31:
        raise bad_request(f"x-priority must be an integer of 32 bits, not {shorten(given)}", "x-priority")
    return priority


def cache_salt(rule: str, key: str, user: str | None) -> str:
    """What keeps one client's cached prefixes from another's: nothing, the API key, or key and user."""
    if rule == "none":
        return ""
    parts = key if rule == "key" else f"{key}\0{user or ''}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]

"""Whether a model can do what a request asks for, and the request in the engine's terms."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.config_file import SAMPLING_KEYS
from tokenmill.server.errors import bad_request, shorten
from tokenmill.server.fim import Fim
from tokenmill.server.grammar_fields import requested_grammar
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.parse import ALIASES, first_of
from tokenmill.server.plan import Variant
from tokenmill.server.prompts import (
    NOTHING_MORE,
    Infill,
    PromptInput,
    check_prompt,
    encode_infill,
    encode_prediction,
    encode_prompts,
    encode_suffix,
)
from tokenmill.server.protocol import MAX_TOKENS_DEFAULT, CompletionRequest
from tokenmill.server.protocol_sampling import INT31

LEAST_REPETITION_PENALTY = 1e-6
"""Logits divided by less would leave float32; they are apart by more than any sampler tells already."""
RERANK_CANDIDATES = 4
"""Candidates for an answer that is chosen by its suffix, where the request doesn't say `best_of`."""


class Job(msgspec.Struct, frozen=True):
    """A request that can be handed to the engine as it is."""

    prompts: list[PromptInput]
    params: SamplingParams
    priority: int
    cache_salt: str
    prediction: list[int] | None = None
    suffix: list[int] | None = None
    """The text to come, where candidates are ranked by how likely it is after them."""
    grammar_param: str | None = None
    """The field that the grammar came from, to be named when the engine can't compile it."""
    tokenizer: Tokenizer | None = None
    """What decodes the answer, where it must show tokens that are otherwise left out."""


def check_limits(request: CompletionRequest, variant: Variant) -> None:
    """The entry's own bounds; nothing here needs the model to be loaded. Raises `ApiError` 400."""
    limits = variant.limits
    bounds = [
        ("stop", len(first_of(request, "stop") or ()), "max_stop"),
        ("n", request.n, "max_n"),
        ("best_of", request.candidates, "max_best_of"),
        ("logprobs", 0 if request.chat_logprobs else request.alternatives or 0, "max_logprobs"),
        ("top_logprobs", request.top_logprobs, "max_logprobs"),
        ("prompt_logprobs", request.prompt_logprobs or 0, "max_logprobs"),
    ]
    for param, given, key in bounds:
        allowed = getattr(limits, key)
        if given > allowed:
            message = f"{param}: {given} is over this model's limit of {allowed}, limits.{key} of its entry"
            raise bad_request(message, param)
    sequences = len(request.prompt) * request.candidates
    if sequences > limits.max_prompts:
        asked = f"{len(request.prompt)} prompts with {request.candidates} candidates each"
        limit = f"{limits.max_prompts} sequences, limits.max_prompts of its entry"
        raise bad_request(f"{asked} are over this model's limit of {limit}", "prompt")


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
    if "repetition_penalty" in values:
        values["repetition_penalty"] = max(values["repetition_penalty"], LEAST_REPETITION_PENALTY)
    stop = values.get("stop", ())
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return values


def sampling_params(
    request: CompletionRequest, variant: Variant, engine: Engine, default_max_tokens: int = MAX_TOKENS_DEFAULT
) -> SamplingParams:
    """The settings of a request for the engine. Raises `ApiError` 400."""
    values = sampling_values(request, variant)
    values.setdefault("max_tokens", default_max_tokens)
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
    request: CompletionRequest,
    variant: Variant,
    engine: Engine,
    headers: Mapping[str, str],
    cache_salt: str,
    *,
    default_max_tokens: int | None = MAX_TOKENS_DEFAULT,
    infill: Infill | None = None,
) -> Job:
    """Prompts as token ids that fit the model, with their settings. Raises `ApiError` 400.

    `default_max_tokens` None: what the longest prompt leaves of the context. `infill`: the request fills in
    the middle of something, even if its suffix is empty.
    """
    fim = await _fim(request, variant, engine, infill)
    if fim is None:
        prompts = await encode_prompts(request, engine, infill or NOTHING_MORE)
    else:
        prompts = await encode_infill(request, engine, fim, infill or NOTHING_MORE)
    ranked_by = await encode_suffix(request.suffix, engine) if request.suffix and fim is None else None
    if default_max_tokens is None:
        longest = max(len(prompt.ids) for prompt in prompts) + len(ranked_by or ())
        default_max_tokens = max(1, engine.context - longest)
    params = sampling_params(request, variant, engine, default_max_tokens)
    requested = requested_grammar(request)
    if requested is not None:
        params = msgspec.structs.replace(params, grammar=requested.grammar)
    if fim is not None and not params.ignore_eos:
        params = msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *fim.stop))
    if ranked_by is not None:
        params = with_candidates(params, variant, len(prompts))
    for prompt in prompts:
        check_prompt(prompt.ids, params.max_tokens, engine, len(ranked_by or ()))
    prediction = None
    if request.prediction is not None and variant.predicts:
        prediction = await encode_prediction(request.prediction.text, engine)
    return Job(
        prompts,
        params,
        _priority(request, headers),
        cache_salt,
        prediction or None,
        ranked_by,
        None if requested is None else requested.param,
    )


async def _fim(
    request: CompletionRequest, variant: Variant, engine: Engine, infill: Infill | None
) -> Fim | None:
    """The tokens for the suffix; None where there is no suffix, or where candidates are ranked by it."""
    if not request.suffix and infill is None:
        return None
    fim = await engine.fim(variant.fim)
    if fim is None and request.suffix and variant.suffix != "rerank":
        message = f"suffix: {variant.name} has no tokens for filling in the middle"
        raise bad_request(message, "suffix", "suffix_not_supported")
    return fim


def with_candidates(params: SamplingParams, variant: Variant, prompts: int) -> SamplingParams:
    """The settings for an answer that is chosen by its suffix: several candidates, if they can differ."""
    if params.best_of is not None or params.greedy or not params.max_tokens:
        return params
    limits = variant.limits
    count = min(RERANK_CANDIDATES, limits.max_best_of, limits.max_prompts // prompts)
    return msgspec.structs.replace(params, best_of=max(params.n, count))


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

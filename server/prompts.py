"""Prompts as token ids: encoded, wrapped for fill in the middle, cut, and checked against the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.errors import ApiError, bad_request
from tokenmill.server.fim import Fim, encode_inside
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.protocol import CompletionRequest

Result = TypeVar("Result")
INLINE = 20_000
"""Longer texts, in characters or tokens, are worked on beside the event loop, so that streams don't wait for them."""


class PromptInput(msgspec.Struct, frozen=True):
    """One prompt: its token ids, and its text where it came as text and all of it is used."""

    ids: list[int]
    text: str | None = None


class Infill(msgspec.Struct, frozen=True):
    """What an editor sends beside the text before and after the cursor."""

    files: tuple[tuple[str, str], ...] = ()
    """Names and texts of what else the model should see."""
    begun: str = ""
    """What already stands at the cursor, to be gone on with."""


NOTHING_MORE = Infill()


async def by_size(size: int, work: Callable[..., Result], *arguments: object) -> Result:
    """What `work` makes of a text of this size: here where it is short, on another thread where it is long."""
    return work(*arguments) if size <= INLINE else await asyncio.to_thread(work, *arguments)


async def encode_prompts(
    request: CompletionRequest, engine: Engine, infill: Infill = NOTHING_MORE
) -> list[PromptInput]:
    """The prompts of a request as ids. Raises `ApiError` 400.

    The parts of an `infill`, for a model without tokens for it, stand before and behind each text.
    """
    keep = request.truncate_prompt_tokens
    head = "".join(f"{name}\n{text}\n" for name, text in infill.files)
    texts = [head + prompt + infill.begun for prompt in request.prompt if isinstance(prompt, str)]
    if not texts:
        lists = [prompt for prompt in request.prompt if isinstance(prompt, list)]
        return [PromptInput(last(ids, keep)) for ids in lists]
    if keep is None:
        check_length(texts, engine)
    encoded = await encode_texts(engine.tokenizer, texts, request.add_special_tokens)
    prompts = []
    for text, ids in zip(texts, encoded, strict=True):
        ids = ids or [_start_token(engine.tokenizer)]
        cut = keep is not None and len(ids) > keep
        prompts.append(PromptInput(last(ids, keep), None if cut else text))
    return prompts


async def encode_infill(
    request: CompletionRequest, engine: Engine, fim: Fim, infill: Infill = NOTHING_MORE
) -> list[PromptInput]:
    """The prompts with the suffix behind them, in the order that the model knows. Raises `ApiError` 400."""
    suffix = request.suffix or ""
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    others = [text for _, text in infill.files]
    check_length([*texts, *others], engine)
    check_length([suffix], engine, "suffix")
    size = sum(map(len, [*texts, suffix, *others])) if fim.ready else INLINE + 1
    return await by_size(size, _infill, request, fim, infill)


def _infill(request: CompletionRequest, fim: Fim, infill: Infill) -> list[PromptInput]:
    after = fim.encode(request.suffix or "", "suffix", inside=True)
    files = fim.encode_files(infill.files)
    begun = fim.encode(infill.begun, "prompt", inside=True)
    prompts = []
    for prompt in request.prompt:
        ids = fim.encode(prompt, "prompt") if isinstance(prompt, str) else prompt
        kept = last(ids, request.truncate_prompt_tokens)
        whole = isinstance(prompt, str) and len(kept) == len(ids)
        # The answer may echo the prompt, which isn't what the model reads.
        text = prompt if whole else fim.tokenizer.decode(kept, request.skip_special_tokens)
        ids = fim.arrange(kept, after, request.add_special_tokens, files) + begun
        prompts.append(PromptInput(ids, str(text)))
    return prompts


async def encode_texts(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text; long ones are encoded on another thread."""
    return await by_size(sum(map(len, texts)), tokenizer.encode_batch, texts, add_special_tokens)


async def encode_suffix(text: str, engine: Engine) -> list[int]:
    """Tokens of a text that is to come behind another. Raises `ApiError` 400 where it can't fit."""
    check_length([text], engine, "suffix")
    return await by_size(len(text), encode_inside, engine.tokenizer, text)


async def encode_prediction(text: str, engine: Engine) -> list[int]:
    """Tokens of the expected output; what is longer than any output can be isn't worth encoding."""
    text = text[: engine.context * engine.tokenizer.longest_token]
    (ids,) = await encode_texts(engine.tokenizer, [text], add_special_tokens=False)
    return ids[: engine.context]


def last(ids: list[int], count: int | None) -> list[int]:
    """The last `count` ids; all where it is None."""
    return ids if count is None else ids[-count:]


def check_length(texts: list[str], engine: Engine, param: str = "prompt") -> None:
    """Refuse a text that can't fit before spending time on encoding it."""
    for text in texts:
        least = len(text) // engine.tokenizer.longest_token
        if least > engine.context:
            raise too_long(f"your {param} has at least {least}", param, engine)


def _start_token(tokenizer: Tokenizer) -> int:
    """What an empty prompt starts from."""
    info = tokenizer.info
    if info.bos_id is not None:
        return info.bos_id
    if info.eos_ids:
        return info.eos_ids[0]
    raise bad_request("prompt is empty, and this model has no token to start from", "prompt")


def check_prompt(ids: list[int], max_tokens: int, engine: Engine, suffix: int = 0) -> None:
    """Ids within the vocabulary, and room for the completion and the suffix behind it. `ApiError` 400."""
    width = engine.ready.logits_width
    if max(ids) >= width:
        wrong = next(token for token in ids if token >= width)
        raise bad_request(f"prompt: token {wrong} is outside the model's vocabulary of {width}", "prompt")
    whole = len(ids) + max_tokens + suffix
    if whole > engine.context:
        param = "prompt" if len(ids) + suffix >= engine.context else "max_tokens"
        parts = f"{len(ids)} in the prompt, {max_tokens} for the completion"
        parts += f", {suffix} in the suffix" if suffix else ""
        raise too_long(f"you asked for {whole} ({parts})", param, engine)


def too_long(asked: str, param: str, engine: Engine) -> ApiError:
    """400: more tokens than the model's context."""
    message = f"This model's maximum context length is {engine.context} tokens, but {asked}"
    return bad_request(message, param, "context_length_exceeded")

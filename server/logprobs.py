"""Log-probabilities as clients read them: legacy arrays, the chat-shaped list, vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tokenmill.engine.messages import TopLogprobs
from tokenmill.engine.tokenizer import Tokenizer, text_stream

LOWEST = -9999.0
"""Stands for minus infinity, which JSON can't say."""


class ScoredTokens(msgspec.Struct):
    """Tokens with what is known of each, in parallel lists. A text's first token has no log-probability."""

    ids: Sequence[int]
    values: Sequence[float | None]
    top: Sequence[TopLogprobs | None]
    offsets: Sequence[int]

    def __add__(self, other: ScoredTokens) -> ScoredTokens:
        return ScoredTokens(
            [*self.ids, *other.ids],
            [*self.values, *other.values],
            [*self.top, *other.top],
            [*self.offsets, *other.offsets],
        )


def finite(value: float) -> float:
    """A log-probability that JSON can carry."""
    return value if value > LOWEST else LOWEST


def legacy_arrays(tokenizer: Tokenizer, tokens: ScoredTokens, alternatives: int) -> dict[str, object]:
    """OpenAI's `tokens`, `token_logprobs`, `top_logprobs`, `text_offset`."""
    texts = [tokenizer.token_text(token) for token in tokens.ids]
    return {
        "tokens": texts,
        "token_logprobs": [None if value is None else finite(value) for value in tokens.values],
        "top_logprobs": [
            None if value is None else _by_text(tokenizer, text, value, top, alternatives)
            for text, value, top in zip(texts, tokens.values, tokens.top, strict=True)
        ],
        "text_offset": list(tokens.offsets),
    }


def _by_text(
    tokenizer: Tokenizer, text: str, value: float, top: TopLogprobs | None, alternatives: int
) -> dict[str, float]:
    """Alternatives by their text, and the token itself; of those that read alike the likeliest stays."""
    best: dict[str, float] = {}
    for token, logprob in _pairs(top, alternatives):
        best.setdefault(tokenizer.token_text(token), finite(logprob))
    best[text] = max(best.get(text, LOWEST), finite(value))
    return best


def _pairs(top: TopLogprobs | None, count: int) -> list[tuple[int, float]]:
    return [] if top is None else list(zip(top.ids[:count], top.values[:count], strict=True))


def chat_content(tokenizer: Tokenizer, tokens: ScoredTokens, alternatives: int) -> list[dict[str, object]]:
    """The chat-shaped list: token, logprob, exact bytes, and the alternatives best first."""
    return [
        {
            **_entry(tokenizer, token, value),
            "top_logprobs": [
                _entry(tokenizer, other, logprob) for other, logprob in _pairs(top, alternatives)
            ],
        }
        for token, value, top in zip(tokens.ids, tokens.values, tokens.top, strict=True)
        if value is not None
    ]


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": finite(value),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def prompt_logprobs(
    tokenizer: Tokenizer, tokens: ScoredTokens, alternatives: int
) -> list[dict[str, object] | None]:
    """vLLM's form: for each prompt token a map of token ids, null for the first; a rank where it is known."""
    rows: list[dict[str, object] | None] = []
    for token, value, top in zip(tokens.ids, tokens.values, tokens.top, strict=True):
        if value is None:
            rows.append(None)
            continue
        ranked: list[tuple[int, float, int | None]] = [
            (other, logprob, rank) for rank, (other, logprob) in enumerate(_pairs(top, alternatives), 1)
        ]
        if all(other != token for other, _, _ in ranked):
            ranked.append((token, value, None))
        rows.append(
            {
                str(other): {
                    "logprob": finite(logprob),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(other),
                }
                for other, logprob, rank in ranked
            }
        )
    return rows


def prompt_offsets(
    tokenizer: Tokenizer, ids: Sequence[int], text: str | None, skip_special: bool
) -> list[int]:
    """Where each prompt token starts in the echoed text: the client's own, or (None) the decoded ids.

    A special token that isn't written in the client's text (BOS) has no width.
    """
    stream = text_stream(tokenizer, (), skip_special_tokens=text is None and skip_special)
    offsets: list[int] = []
    position = 0
    for token in ids:
        offsets.append(position)
        if text is not None and token in tokenizer.special_ids:
            written = tokenizer.token_text(token)
            position += len(written) if text.startswith(written, position) else 0
        else:
            position += len(stream.feed(token))
    return offsets if text is None else [min(offset, len(text)) for offset in offsets]

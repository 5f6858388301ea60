"""How one request wants its tokens chosen: the fields of the API that reach the engine."""

from __future__ import annotations

import math
import secrets
from typing import Literal

import msgspec

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow float32."""

MAX_CANDIDATES = 128
MAX_TOP_LOGPROBS = 20
_MASK64 = (1 << 64) - 1


class Grammar(msgspec.Struct, frozen=True):
    """What a completion must look like. `text` is the schema, the regular expression, the JSON list of choices,
    or the Lark or EBNF grammar."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of one request; every bound is checked when it is made (`ValueError` names the field).

    `n` candidates are generated for `best_of` and the best `n` are returned; the engine itself only knows
    `candidates`. `logprobs` is None for off, else the number of alternatives beside the sampled token.
    `seed` None draws a random one. Stop strings are matched on text, so they act where the text is made
    (`engine/detokenizer.py`), everything else acts in the sampler.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_CANDIDATES)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_CANDIDATES)
        _check_int("max_tokens", self.max_tokens, 0, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be above 0")
        _check_int("top_k", self.top_k, -1, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0)
        if self.repetition_penalty == 0.0:
            raise ValueError("repetition_penalty must be above 0")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if any(not stop for stop in self.stop):
            raise ValueError("stop must not hold an empty string")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, None)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_TOP_LOGPROBS)

    @property
    def candidates(self) -> int:
        """How many sequences the engine generates from the one prompt."""
        return self.best_of or self.n

    @property
    def scored(self) -> bool:
        """Whether the sampled tokens' log-probabilities are needed: asked for, or to rank the candidates."""
        return self.logprobs is not None or self.candidates > self.n

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether the sampler must count this request's tokens."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def derive_seed(seed: int, choice: int) -> int:
    """The seed of one choice's own noise stream, as a signed 64-bit integer.

    A hash of both, never a sum: neighbouring seeds must not share streams (splitmix64's finaliser,
    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    """
    z = (_mix64((seed & _MASK64) ^ 0x6A09E667F3BCC909) + (choice + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = _mix64(z)
    return z - (1 << 64) if z >= (1 << 63) else z


def random_seed() -> int:
    """A seed for a request that gave none."""
    return secrets.randbits(63)


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, not {value!r:.40}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {_range(low, high)}, not {value!r:.40}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r:.40}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {_range(low, high)}, not {value!r:.40}")


def _range(low: float, high: float | None) -> str:
    return f"at least {low}" if high is None else f"from {low} to {high}"

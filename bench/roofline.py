"""The least time that a piece of work can take on a machine: what its memory and its arithmetic allow.

A decode step must read every weight once and each running sequence's keys and values; a prompt must be
multiplied with every weight. Nothing else is counted, so no engine reaches the limit, and the share of it
that was reached says how much is left to gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured on this machine, with all that it has."""

    device: str
    dtype: str
    read_bytes_per_s: float
    matmul_flops_per_s: float
    threads: int | None = None

    def row(self) -> dict[str, object]:
        """For the JSON row."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one model makes a step read and multiply.

    `weight_bytes` and `weights` count the matrices that every token meets, `expert_bytes` and
    `expert_weights` those of all experts together, of which a token meets `expert_share`. An input embedding
    that isn't the output's too is left out: of it a step reads a few rows.
    """

    weight_bytes: float
    weights: float
    kv_bytes_per_token: float
    expert_bytes: float = 0.0
    expert_weights: float = 0.0
    expert_share: float = 1.0

    def read_bytes(self, tokens: float) -> float:
        """Weights that a step over `tokens` tokens reads: with many tokens nearly every expert is met."""
        met = 1.0 - math.pow(1.0 - self.expert_share, tokens)
        return self.weight_bytes + self.expert_bytes * met

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions in the matrix products of one token."""
        return 2.0 * (self.weights + self.expert_weights * self.expert_share)

    def row(self) -> dict[str, object]:
        """For the JSON row."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Work:
    """One measured piece of work: each request's (prompt, output) tokens; at most `batch` ran at once."""

    lengths: Sequence[tuple[int, int]]
    batch: int

    @property
    def output_tokens(self) -> int:
        return sum(output for _, output in self.lengths)

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt for prompt, _ in self.lengths)

    @property
    def decode_steps(self) -> int:
        """Fewest steps: the batch is always full, or one request is long."""
        longest = max((output for _, output in self.lengths), default=0)
        return max(-(-self.output_tokens // self.batch), longest)

    @property
    def kv_reads(self) -> float:
        """Cached tokens read by all decode steps: each output token reads all before it."""
        return sum(prompt * output + output * (output - 1) / 2 for prompt, output in self.lengths)


def decode_bytes(footprint: Footprint, work: Work) -> float:
    """Weights and cache that all decode steps read."""
    steps = work.decode_steps
    weights = steps * footprint.read_bytes(work.output_tokens / steps)
    return weights + work.kv_reads * footprint.kv_bytes_per_token


def decode_seconds(limits: Limits, footprint: Footprint, work: Work) -> float:
    """Least time of all decode steps: the slower of memory and arithmetic."""
    read = decode_bytes(footprint, work)
    multiply = work.output_tokens * footprint.flops_per_token
    return max(read / limits.read_bytes_per_s, multiply / limits.matmul_flops_per_s)


def prefill_seconds(limits: Limits, footprint: Footprint, work: Work) -> float:
    """Least time of all prompts."""
    return work.prompt_tokens * footprint.flops_per_token / limits.matmul_flops_per_s


def least_seconds(limits: Limits, footprint: Footprint, work: Work) -> float:
    """Least time of the whole work."""
    return decode_seconds(limits, footprint, work) + prefill_seconds(limits, footprint, work)


def flops_per_byte(footprint: Footprint, work: Work) -> float:
    """Arithmetic intensity of the decode steps: the x axis of a roofline plot."""
    return work.output_tokens * footprint.flops_per_token / decode_bytes(footprint, work)

"""Sampling on the CPU, twins of `kernels/reference.py`: no full sort, no noise for tokens that can't win.

Logits are contiguous [N, V], float32, or bfloat16 where nothing is changed in place. A NaN is never chosen.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import check, required, type_of

_SAMPLING = struct.Struct("@9P2qi")
"""`Sampling` of src/sampling.cpp."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Token ids [N] int64 drawn from logits [N, V] by Gumbel-max; rows below GREEDY_BELOW take argmax.

    Filters in the order min_p, top_k, top_p, equal values by rising id. All settings are [N]: float32, but
    `top_k` (0: off), `seeds`, `positions` int64.
    """
    return draw(logits, temperature, min_p, top_k, top_p, seeds, positions)[0]


def draw(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `sample`, with flags [N] bool: rows that hold a NaN or have no finite largest logit."""
    rows, vocabulary = logits.shape
    check(logits, "logits", (rows, vocabulary))
    floats = [check(x, "setting", (rows,), torch.float32).data_ptr() for x in (temperature, min_p, top_p)]
    ints = [check(x, "setting", (rows,), torch.int64).data_ptr() for x in (top_k, seeds, positions)]
    chosen, flags = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    required().tm_sample(
        _SAMPLING.pack(
            *(logits.data_ptr(), floats[0], floats[1], ints[0], floats[2], ints[1], ints[2]),
            *(chosen.data_ptr(), flags.data_ptr(), rows, vocabulary, type_of(logits)),
        )
    )
    return chosen, flags


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value of each row, the lowest among equals: [N, V] → [N] int64."""
    rows = values.shape[0]
    zeros, ints = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    return sample(values, zeros, zeros, ints, zeros, ints, ints)


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [N, n], of seeds and positions [N] and token ids [n], all int64."""
    rows, count = seeds.shape[0], tokens.shape[0]
    check(seeds, "seeds", (rows,), torch.int64)
    check(positions, "positions", (rows,), torch.int64)
    check(tokens, "tokens", (count,), torch.int64)
    noise = torch.empty(rows, count)
    required().tm_gumbel(
        seeds.data_ptr(), positions.data_ptr(), rows, tokens.data_ptr(), count, noise.data_ptr()
    )
    return noise


def token_logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits [N, V] at `chosen` [N] int64, and its `top` best (at most V).

    Returns (logprobs [N] float32, top ids [N, top] int64, top logprobs [N, top] float32), best first, equal
    values by rising id.
    """
    rows, vocabulary = logits.shape
    top = min(top, vocabulary)
    check(logits, "logits", (rows, vocabulary))
    check(chosen, "chosen", (rows,), torch.int64)
    picked, values = torch.empty(rows), torch.empty(rows, top)
    ids = torch.empty(rows, top, dtype=torch.int64)
    required().tm_token_logprobs(
        *(logits.data_ptr(), type_of(logits), rows, vocabulary, chosen.data_ptr(), top),
        *(picked.data_ptr(), ids.data_ptr(), values.data_ptr()),
    )
    return picked, ids, values


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_seen: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise repeated tokens in place: logits [N, V] float32.

    Row i uses line `slots[i]` (int64, -1: none) of `output_counts` [M, V] int32 and `prompt_seen` [M, V]
    bool; `repetition`, `presence`, `frequency` are [N] float32.
    """
    rows, vocabulary = logits.shape
    lines = output_counts.shape[0]
    check(logits, "logits", (rows, vocabulary), torch.float32)
    check(slots, "slots", (rows,), torch.int64)
    check(output_counts, "output_counts", (lines, vocabulary), torch.int32)
    check(prompt_seen, "prompt_seen", (lines, vocabulary), torch.bool)
    settings = [check(x, "setting", (rows,), torch.float32) for x in (repetition, presence, frequency)]
    required().tm_penalties(
        *(logits.data_ptr(), rows, vocabulary, slots.data_ptr()),
        *(output_counts.data_ptr(), prompt_seen.data_ptr(), *(x.data_ptr() for x in settings)),
    )


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Set logits[rows[i], t] to -inf where bit t % 32 of bitmask[i, t // 32] (int32) is 0; in place."""
    count, words = bitmask.shape
    check(logits, "logits", (logits.shape[0], logits.shape[1]), torch.float32)
    check(rows, "rows", (count,), torch.int64)
    check(bitmask, "bitmask", (count, words), torch.int32)
    if words * 32 < logits.shape[1]:
        raise ValueError(f"a bitmask of {words} words doesn't cover {logits.shape[1]} tokens")
    required().tm_bitmask(
        *(logits.data_ptr(), logits.shape[1], rows.data_ptr(), count, bitmask.data_ptr(), words)
    )

"""Log-softmax of the chosen token and of the best few, in one launch over the raw logits.

Each block of a row leaves its maximum, its sum and its own best tokens; the last block to finish folds them
in block order. The next best token is the largest that comes after the last one found, by (falling value,
rising id): so nothing needs to be marked as taken, and ties, -inf and NaN need no case of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, jit_with_runtime, next_power_of_2, tl

MAX_TOP = 20

_BLOCK = 8192
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True)
class LogprobsWorkspace:
    """What the blocks of a row leave for the last one, for up to N rows of V logits; make it once."""

    sums: Tensor  # [N, blocks, 2] float32: maximum, sum of e^(x - maximum)
    values: Tensor  # [N, blocks, MAX_TOP] float32
    tokens: Tensor  # [N, blocks, MAX_TOP] int32
    done: Tensor  # [N] int32; 0 between launches


def make_logprobs_workspace(rows: int, width: int, device: torch.device) -> LogprobsWorkspace:
    """Buffers for logits of up to `rows` rows and `width` columns."""
    blocks = ceil_div(width, _BLOCK)
    return LogprobsWorkspace(
        sums=torch.zeros(rows, blocks, 2, dtype=torch.float32, device=device),
        values=torch.zeros(rows, blocks, MAX_TOP, dtype=torch.float32, device=device),
        tokens=torch.zeros(rows, blocks, MAX_TOP, dtype=torch.int32, device=device),
        done=torch.zeros(rows, dtype=torch.int32, device=device),
    )


@jit
def next_best(x: tl.tensor, tokens: tl.tensor, last: tl.tensor, last_token: tl.tensor) -> tl.tensor:
    """(value, token) that follows (last, last_token) by falling value, then rising token.

    Neither NaN nor a token below 0 ever follows.
    """
    after = (tokens >= 0) & ((x < last) | ((x == last) & (tokens > last_token)))
    value = tl.max(tl.where(after, x, float("-inf")), axis=0)
    return value, tl.min(tl.where(after & (x == value), tokens, _NO_TOKEN), axis=0)


@jit_with_runtime("top")
def _logprobs_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    chosen_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    values_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    done_ptr: tl.tensor,
    picked_ptr: tl.tensor,
    top_ids_ptr: tl.tensor,
    top_ptr: tl.tensor,
    top: tl.tensor,
    blocks: tl.tensor,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MERGED: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < V
    x = tl.load(logits_ptr + row * stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    tokens = tl.where(inside, tokens, -1)
    highest = tl.max(tl.where(x == x, x, float("-inf")), axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    place = row * blocks + block
    tl.store(sums_ptr + place * 2, highest)
    tl.store(sums_ptr + place * 2 + 1, tl.sum(tl.exp(x - shift), axis=0))
    last, last_token = tl.where(block >= 0, float("inf"), 0.0), block * 0 - 1
    for rank in range(top):
        last, last_token = next_best(x, tokens, last, last_token)
        tl.store(values_ptr + place * MOST + rank, last)
        tl.store(tokens_ptr + place * MOST + rank, last_token)
    tl.debug_barrier()
    arrived = tl.atomic_add(done_ptr + row, 1, sem="acq_rel")
    if arrived == blocks - 1:
        tl.store(done_ptr + row, 0)
        each = tl.arange(0, BLOCKS)
        at = sums_ptr + (row * blocks + each) * 2
        highs = tl.load(at, mask=each < blocks, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(at + 1, mask=each < blocks, other=0.0, cache_modifier=".cg")
        overall = tl.max(highs, axis=0)
        overall = tl.where(overall == float("-inf"), 0.0, overall)
        highs = tl.where(highs == float("-inf"), 0.0, highs)
        normalizer = overall + tl.log(tl.sum(sums * tl.exp(highs - overall), axis=0))
        token = tl.load(chosen_ptr + row)
        logit = tl.load(logits_ptr + row * stride + token).to(tl.float32)
        tl.store(picked_ptr + row, logit - normalizer)
        each_best = tl.arange(0, MERGED)
        real = (each_best < blocks * MOST) & (each_best % MOST < top)
        at_best = row * blocks * MOST + each_best
        values = tl.load(values_ptr + at_best, mask=real, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(tokens_ptr + at_best, mask=real, other=-1, cache_modifier=".cg")
        ids = tl.where(ids == _NO_TOKEN, -1, ids)
        best, best_token = tl.where(block >= 0, float("inf"), 0.0), block * 0 - 1
        for rank in range(top):
            best, best_token = next_best(values, ids, best, best_token)
            tl.store(top_ids_ptr + row * top + rank, tl.minimum(best_token, V - 1).to(tl.int64))
            tl.store(top_ptr + row * top + rank, best - normalizer)


def token_logprobs(
    logits: Tensor, chosen: Tensor, top: int, *, workspace: LogprobsWorkspace | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits [N, V] at `chosen` [N] int64, and its `top` best (0 .. MAX_TOP, at most V).

    Returns (logprobs [N] float32, top ids [N, top] int64, top logprobs [N, top] float32), best first, equal
    values by rising id. Where NaN leaves fewer than `top` tokens to rank, the rest repeats the last id.
    """
    check_cuda(logits, chosen)
    rows, width = logits.shape
    if not 0 <= top <= min(MAX_TOP, width):
        raise ValueError(f"top must be from 0 to {min(MAX_TOP, width)}, not {top}")
    picked = torch.empty(rows, dtype=torch.float32, device=logits.device)
    top_ids = torch.empty(rows, top, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, top, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return picked, top_ids, best
    space = make_logprobs_workspace(rows, width, logits.device) if workspace is None else workspace
    blocks = ceil_div(width, _BLOCK)
    _logprobs_kernel[(rows, blocks)](
        logits, logits.stride(0), width, chosen, space.sums, space.values, space.tokens, space.done,
        picked, top_ids, best, top, blocks,
        MOST=MAX_TOP, BLOCK=_BLOCK, BLOCKS=next_power_of_2(blocks), MERGED=next_power_of_2(blocks * MAX_TOP),
        num_warps=8,
    )  # fmt: skip
    return picked, top_ids, best

"""Drawing tokens by Gumbel-max in two launches: thresholds of the rows that filter, then one choosing pass.

    logits [N, V] ──┬── filters: threshold and cut of each row
                    └── choose: x / T + noise where kept ─▶ best of each block ─▶ last block: best of the row

The last block of a row to finish writes the token, counts it among the row's outputs and reports a sick row.
Noise is a function of (seed, position, token), and equal values go to the lowest id, so the order in which
blocks finish can't be seen in the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.filters import CANDIDATES, GREEDY_BELOW, filter_thresholds, kept
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.noise import gumbel, noise_key

NAN_ROW = 1
"""Flag of a row that holds NaN or +inf."""
EMPTY_ROW = 2
"""Flag of a row in which no token is allowed."""

_BLOCK = 4096
_NAN_ROW = tl.constexpr(NAN_ROW)
_EMPTY_ROW = tl.constexpr(EMPTY_ROW)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


@dataclass(frozen=True)
class SamplingWorkspace:
    """What `sample` needs between its launches, for up to N rows of V logits; make it once."""

    thresholds: Tensor  # [N] float32
    cuts: Tensor  # [N] int32
    scratch: Tensor  # [N, CANDIDATES] float32
    best: Tensor  # [N, blocks] float32
    tokens: Tensor  # [N, blocks] int32
    flags: Tensor  # [N, blocks] int32
    done: Tensor  # [N] int32; 0 between launches


def make_sampling_workspace(rows: int, width: int, device: torch.device) -> SamplingWorkspace:
    """Buffers for logits of up to `rows` rows and `width` columns."""
    blocks = ceil_div(width, _BLOCK)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    return SamplingWorkspace(
        thresholds=floats(rows),
        cuts=integers(rows),
        scratch=floats(rows, CANDIDATES),
        best=floats(rows, blocks),
        tokens=integers(rows, blocks),
        flags=integers(rows, blocks),
        done=integers(rows),
    )


@jit
def _first_best(x: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """(value, token) of the largest value, the lowest token among equals."""
    best = tl.max(x, axis=0)
    return best, tl.min(tl.where(x == best, tokens, 0x7FFFFFFF), axis=0)


@jit
def _choose_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    temperature_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    cuts_ptr: tl.tensor,
    best_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    block_flags_ptr: tl.tensor,
    done_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    flags_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    FILTERED: tl.constexpr,
    COUNT: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < V
    raw = tl.load(logits_ptr + row * stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    sick = inside & ((raw != raw) | (raw == float("inf")))
    x = tl.where(sick, float("-inf"), raw)
    flag = tl.max(sick.to(tl.int32), axis=0)
    temperature = tl.load(temperature_ptr + row)
    if temperature >= _GREEDY_BELOW:
        scaled = tl.div_rn(x, temperature) + 0.0
        noise = gumbel(noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)), tokens)
        x = scaled + noise
        if FILTERED:
            passes = kept(scaled, tokens, tl.load(thresholds_ptr + row), tl.load(cuts_ptr + row))
            x = tl.where(passes, x, float("-inf"))
    best, token = _first_best(x, tokens)
    place = row * blocks + block
    tl.store(best_ptr + place, best)
    tl.store(tokens_ptr + place, token)
    tl.store(block_flags_ptr + place, flag)
    tl.debug_barrier()
    arrived = tl.atomic_add(done_ptr + row, 1, sem="acq_rel")
    if arrived == blocks - 1:
        each = tl.arange(0, BLOCKS)
        real = each < blocks
        values = tl.load(best_ptr + row * blocks + each, mask=real, other=float("-inf"), cache_modifier=".cg")
        ids = tl.load(tokens_ptr + row * blocks + each, mask=real, other=0x7FFFFFFF, cache_modifier=".cg")
        found, chosen = _first_best(values, ids)
        tl.store(out_ptr + row, chosen.to(tl.int64))
        tl.store(done_ptr + row, 0)
        if FLAGS:
            sickness = tl.load(
                block_flags_ptr + row * blocks + each, mask=real, other=0, cache_modifier=".cg"
            )
            empty = tl.where(found == float("-inf"), _EMPTY_ROW, 0)
            tl.store(flags_ptr + row, tl.where(tl.max(sickness, axis=0) > 0, _NAN_ROW, empty))
        if COUNT:
            slot = tl.load(slots_ptr + row).to(tl.int64)
            if slot >= 0:
                tl.atomic_add(counts_ptr + slot * V + chosen, 1)


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    filtered: bool = True,
    slots: Tensor | None = None,
    output_counts: Tensor | None = None,
    flags: Tensor | None = None,
    workspace: SamplingWorkspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Token ids [N] int64 drawn from logits [N, V] by Gumbel-max; see `reference.sample`.

    `filtered=False` says that no row filters and saves a launch. With `slots` [N] int64 (-1: none) and
    `output_counts` [M, V] int32 each token is counted in its row's line. `flags` [N] int32 receives 0,
    NAN_ROW or EMPTY_ROW; the token of such a row is some id inside the vocabulary.
    """
    check_cuda(logits, temperature, min_p, top_k, top_p, seeds, positions)
    rows, width = logits.shape
    if (slots is None) != (output_counts is None):
        raise ValueError("slots and output_counts are given together or not at all")
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    space = make_sampling_workspace(rows, width, logits.device) if workspace is None else workspace
    if filtered:
        filter_thresholds(
            logits, temperature, min_p, top_k, top_p,
            thresholds=space.thresholds, cuts=space.cuts, scratch=space.scratch,
        )  # fmt: skip
    blocks = ceil_div(width, _BLOCK)
    _choose_kernel[(rows, blocks)](
        logits, logits.stride(0), width, temperature, seeds, positions, space.thresholds, space.cuts,
        space.best, space.tokens, space.flags, space.done,
        seeds if slots is None else slots, space.tokens if output_counts is None else output_counts,
        space.flags if flags is None else flags, out, blocks,
        FILTERED=filtered, COUNT=output_counts is not None, FLAGS=flags is not None,
        BLOCK=_BLOCK, BLOCKS=next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    return out


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value of each row, the lowest among equals: [N, V] → [N] int64."""
    zeros = torch.zeros(values.shape[0], dtype=torch.float32, device=values.device)
    whole = torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)
    return sample(values, zeros, zeros, whole, zeros, whole, whole, filtered=False)

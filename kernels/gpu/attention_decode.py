"""Paged attention for decode: one query a sequence, its keys split over programs.

    sequence of 300 tokens, splits of 64      programs take (row, chunk) items off a list, for each KV head
    │ 0 .. 63 │ 64 .. 127 │ … │ 256 .. 299 │
         │          │              │          every split gives a state of its own;
         ▼          ▼              ▼          the last program of a row folds them, first split first
       state ⊕   state  ⊕  …  ⊕  state  →  out

The size of a split depends on the sequence's own length alone, a split's state on its own keys alone, and the
fold's order is fixed: so a row's output is the same to the bit whatever else is in the batch, and whether one
program walks the row (big batches) or many do (small ones). All query heads of a KV head form one tile, so
each key is read once. Nothing here depends on a length known to the host: the list of items is made on the
device, once a step, and a graph may replay both kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.attention_tile import attend_tile, empty_state, finish_state, merge_states
from tokenmill.kernels.gpu.jit import (
    check_cuda,
    jit,
    jit_with_runtime,
    multiprocessors,
    next_power_of_2,
    row_block,
    tl,
)
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs

MAX_SPLITS = 64
"""A sequence has at most this many splits (one more where a window's edge cuts one)."""

_MAX_SPLITS = tl.constexpr(MAX_SPLITS)
_ITEM_CHUNKS = tl.constexpr(2 * MAX_SPLITS)


@dataclass(frozen=True)
class DecodePlan:
    """The step's list of work, in buffers that outlive it: make it once, fill it by `plan_decode` each step.

    A plan serves all layers of one window. Rows whose states don't fit into `mixed` are walked by one
    program: slower, with the same result.
    """

    items: Tensor  # [rows + capacity] int32: row * 2 * MAX_SPLITS + chunk
    count: Tensor  # [1] int32
    bases: Tensor  # [rows] int32: a row's first state, -1 where one program walks the row
    states: Tensor  # [capacity, H, 2] float32: top and total
    mixed: Tensor  # [capacity, H, E] float32
    done: Tensor  # [rows, G] int32: programs that are through with a row; 0 between launches
    tile: int  # keys a tile, which is also the smallest split
    window: int


def tile_keys(size: int, value_size: int, dtype: torch.dtype) -> int:
    """Keys a tile: at most 16 KiB of them, so that a multiprocessor holds several tiles of two programs."""
    width = next_power_of_2(max(size, value_size)) * dtype.itemsize
    return max(16, min(64, 16384 // width))


def make_decode_plan(
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int,
    cache_dtype: torch.dtype,
    device: torch.device,
    *,
    window: int = 0,
    capacity: int | None = None,
) -> DecodePlan:
    """Buffers for up to `rows` sequences; `capacity` states (each heads * (value_size + 2) floats)."""
    capacity = min(rows * (MAX_SPLITS + 1), 4096) if capacity is None else capacity

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return DecodePlan(
        items=integers(rows + capacity),
        count=integers(1),
        bases=integers(rows),
        states=torch.empty(capacity, heads, 2, dtype=torch.float32, device=device),
        mixed=torch.empty(capacity, heads, value_size, dtype=torch.float32, device=device),
        done=integers(rows, kv_heads),
        tile=tile_keys(size, value_size, cache_dtype),
        window=window,
    )


@jit
def _splits(lengths: tl.tensor, window: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr) -> tl.tensor:
    """(tokens a split, first split, splits) of sequences: the smallest power of two that needs few splits."""
    first_key = lengths * 0
    if WINDOW:
        first_key = tl.maximum(lengths - window, 0)
    size = first_key * 0 + TILE
    for _ in tl.static_range(16):
        size = tl.where(size * _MAX_SPLITS < lengths - first_key, size * 2, size)
    return size, first_key // size, tl.cdiv(lengths, size) - first_key // size


@jit_with_runtime("rows", "capacity")
def _plan_kernel(
    lengths_ptr: tl.tensor,
    items_ptr: tl.tensor,
    count_ptr: tl.tensor,
    bases_ptr: tl.tensor,
    rows: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    item_tokens: tl.tensor,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program a row; each counts all rows' items to find its own place in the list."""
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    every = tl.arange(0, BLOCK_R)
    lengths = tl.load(lengths_ptr + every, mask=every < rows, other=0)
    size, _, splits = _splits(lengths, window, TILE, WINDOW)
    items = tl.cdiv(splits, tl.maximum(item_tokens // size, 1))
    shared = tl.where(items > 1, splits, 0)
    upto = tl.cumsum(shared, axis=0)
    split_up = (items > 1) & (upto <= capacity)
    items = tl.where(every < rows, tl.where(split_up, items, 1), 0)
    mine = every == row
    tl.store(bases_ptr + row, tl.sum(tl.where(mine, tl.where(split_up, upto - shared, -1), 0), axis=0))
    place = tl.sum(tl.where(every < row, items, 0), axis=0)
    chunks = tl.arange(0, _ITEM_CHUNKS)
    wanted = tl.sum(tl.where(mine, items, 0), axis=0)
    tl.store(items_ptr + place + chunks, row * _ITEM_CHUNKS + chunks, mask=chunks < wanted)
    if row == 0:
        tl.store(count_ptr, tl.sum(items, axis=0))


def item_tokens(rows: int, kv_heads: int, device: torch.device) -> int:
    """Keys that one program takes at most: few when there are few rows to fill the chip with."""
    return 128 if rows * kv_heads < 2 * multiprocessors(device) else 4096


def plan_decode(plan: DecodePlan, seq_lens: Tensor) -> None:
    """Fill `plan` for sequences of `seq_lens` [R] int32 tokens, 0 for padding. Once a step and window."""
    check_cuda(seq_lens)
    rows = seq_lens.shape[0]
    if rows == 0:
        return
    _plan_kernel[(rows,)](
        seq_lens, plan.items, plan.count, plan.bases, rows, plan.mixed.shape[0], plan.window,
        item_tokens(rows, plan.done.shape[1], seq_lens.device),
        TILE=plan.tile, WINDOW=plan.window > 0, BLOCK_R=row_block(rows), num_warps=4,
        **launch_options(),
    )  # fmt: skip


@jit
def _store_state(
    states_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    at: tl.tensor,
    heads: tl.tensor,
    real: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    H: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    e = tl.arange(0, BLOCK_E)
    line = at.to(tl.int64) * H + heads
    tl.store(states_ptr + line * 2, top, mask=real)
    tl.store(states_ptr + line * 2 + 1, total, mask=real)
    tl.store(mixed_ptr + line[:, None] * E + e[None, :], mixed, mask=real[:, None] & (e < E)[None, :])


@jit
def _fold_states(
    states_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    base: tl.tensor,
    count: tl.tensor,
    heads: tl.tensor,
    real: tl.tensor,
    H: tl.tensor,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> tl.tensor:
    """The fold of `count` states from `base` on, past the L1 cache: other multiprocessors wrote them.

    The fold waits for each state in turn; unrolled, the loads of eight are on their way together.
    """
    top, total, mixed = empty_state(BLOCK_M, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    inside = real[:, None] & (e < E)[None, :]
    for step in tl.range(0, count, loop_unroll_factor=8):
        line = (base + step).to(tl.int64) * H + heads
        one_top = tl.load(states_ptr + line * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
        one_total = tl.load(states_ptr + line * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
        values = mixed_ptr + line[:, None] * E + e[None, :]
        one_mixed = tl.load(values, mask=inside, other=0.0, cache_modifier=".cg")
        top, total, mixed = merge_states(top, total, mixed, one_top, one_total, one_mixed)
    return top, total, mixed


@jit
def _finish_row(
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    states_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    done_ptr: tl.tensor,
    base: tl.tensor,
    splits: tl.tensor,
    programs: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    heads: tl.tensor,
    real: tl.tensor,
    v_scale: tl.tensor,
    H: tl.tensor,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """Write a row's output, if this program has all of it or is the last of `programs` to arrive.

    Every thread's states are stored before the barrier, one thread then arrives with release and acquire: so
    the last program finds the states of all.
    """
    complete = base < 0
    if base >= 0:
        tl.debug_barrier()
        complete = tl.atomic_add(done_ptr, 1, sem="acq_rel") + 1 == programs
        if complete:
            top, total, mixed = _fold_states(
                states_ptr, mixed_ptr, base, splits, heads, real, H, E, BLOCK_M, BLOCK_E
            )
            tl.store(done_ptr, 0)
    if complete:
        sink = top
        if SINKS:
            sink = tl.load(sinks_ptr + heads, mask=real, other=0.0).to(tl.float32)
        out = finish_state(top, total, mixed, sink, SINKS) * v_scale
        e = tl.arange(0, BLOCK_E)
        inside = real[:, None] & (e < E)[None, :]
        tl.store(out_ptr + heads[:, None] * E + e[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@jit_with_runtime("table_stride")
def _decode_kernel(
    query_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    items_ptr: tl.tensor,
    count_ptr: tl.tensor,
    bases_ptr: tl.tensor,
    states_ptr: tl.tensor,
    mixed_ptr: tl.tensor,
    done_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    v_scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    item_tokens: tl.tensor,
    G: tl.tensor,
    GROUP: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = m < GROUP
    for work in range(tl.program_id(0), tl.load(count_ptr) * G, tl.num_programs(0)):
        item, g = tl.load(items_ptr + work // G), work % G
        row, chunk = item // _ITEM_CHUNKS, item % _ITEM_CHUNKS
        heads = g * GROUP + m
        length, base = tl.load(lengths_ptr + row), tl.load(bases_ptr + row)
        size, first, splits = _splits(length, window, TILE, WINDOW)
        first_key = length * 0
        if WINDOW:
            first_key = tl.maximum(length - window, 0)
        own = tl.maximum(tl.where(base < 0, splits, item_tokens // size), 1)
        begin = tl.maximum((first + chunk * own) * size, first_key // TILE * TILE)
        end = tl.minimum((first + (chunk + 1) * own) * size, length)
        at = query_ptr + row.to(tl.int64) * query_stride + heads[:, None] * D + d[None, :]
        query = tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0)
        positions = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)

        top, total, mixed = empty_state(BLOCK_M, BLOCK_E)
        one_top, one_total, one_mixed = empty_state(BLOCK_M, BLOCK_E)
        for start in tl.range(begin, end, TILE, num_stages=STAGES):
            one_top, one_total, one_mixed = attend_tile(
                query, one_top, one_total, one_mixed,
                k_cache_ptr + g * S * D, v_cache_ptr + g * S * E, table_ptr + row.to(tl.int64) * table_stride,
                G * S * D, G * S * E, start, length, positions, scale, softcap, window,
                S, D, E, BLOCK_D, BLOCK_E, TILE, True, SOFTCAP, WINDOW,
            )  # fmt: skip
            if ((start + TILE) % size == 0) | (start + TILE >= end):
                if base < 0:
                    top, total, mixed = merge_states(top, total, mixed, one_top, one_total, one_mixed)
                else:
                    line = base + start // size - first
                    _store_state(
                        states_ptr, mixed_ptr, line, heads, real, one_top, one_total, one_mixed,
                        G * GROUP, E, BLOCK_E,
                    )  # fmt: skip
                one_top, one_total, one_mixed = empty_state(BLOCK_M, BLOCK_E)

        _finish_row(
            top, total, mixed, states_ptr, mixed_ptr, done_ptr + row * G + g, base, splits,
            tl.cdiv(splits, own), sinks_ptr, out_ptr + row.to(tl.int64) * G * GROUP * E, heads, real, v_scale,
            G * GROUP, E, BLOCK_M, BLOCK_E, SINKS,
        )  # fmt: skip


def paged_attention_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    plan: DecodePlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention` with one query a sequence: query [R, H, D] → [R, H, E].

    `plan` must have been filled for these `seq_lens` and this `window`; without one, it is made here. A row
    of length 0 gives zeros. An fp8 cache holds value / scale (`k_scale`, `v_scale`).
    """
    check_cuda(query, k_cache, v_cache, block_table, seq_lens)
    rows, heads, d = query.shape
    kv_heads, size, e = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    if plan is None:
        plan = make_decode_plan(rows, heads, kv_heads, d, e, k_cache.dtype, query.device, window=window)
        plan_decode(plan, seq_lens)
    if plan.window != window or plan.tile != tile_keys(d, e, k_cache.dtype):
        raise ValueError(f"the plan is for window {plan.window} and tiles of {plan.tile} keys")
    if out is None:
        out = torch.empty(rows, heads, e, dtype=query.dtype, device=query.device)
    if rows == 0:
        return out
    block_m = max(16, next_power_of_2(heads // kv_heads))
    warps = 4 if block_m < 64 and max(d, e) <= 256 else 8
    items = rows + min(plan.mixed.shape[0], rows * (MAX_SPLITS + 1))
    _decode_kernel[(min(items * kv_heads, 4 * multiprocessors(query.device)),)](
        query, k_cache, v_cache, block_table, seq_lens,
        plan.items, plan.count, plan.bases, plan.states, plan.mixed, plan.done,
        query if sinks is None else sinks, out, query.stride(0), block_table.stride(0),
        scale * k_scale, v_scale, softcap, window, item_tokens(rows, kv_heads, query.device), kv_heads,
        GROUP=heads // kv_heads, S=size, D=d, E=e, BLOCK_M=block_m, BLOCK_D=next_power_of_2(d),
        BLOCK_E=next_power_of_2(e), TILE=plan.tile, STAGES=5 if block_m < 64 else 3,
        SOFTCAP=softcap > 0, WINDOW=window > 0, SINKS=sinks is not None, num_warps=warps,
        **launch_options(),
    )  # fmt: skip
    return out

"""Paged attention for prefill: chunks of any length over the cache, one launch for a mixed batch.

    queries of a step   │ row 0: 50 │ row 1: 1 │ row 2: 500 … │
    tiles (32 tokens)   │ 0 │ 1     │ 0        │ 15 14 … 1 0  │   a list made on the device from query_start

A program takes one tile of queries of one KV head: all query heads of that KV head side by side, so each key
is read once for the group. It walks the keys that the tile can see, from the window's edge to the diagonal:
tiles that every row sees whole first, then those cut by the diagonal. Key tiles begin at multiples of their
size, so a query's sums are the same however its prompt was cut into chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.attention_tile import attend_tile, empty_state, finish_state
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit_with_runtime, next_power_of_2, row_block, tl

_LIST_BLOCK = tl.constexpr(128)


@dataclass(frozen=True)
class PrefillPlan:
    """The step's tiles, pairs (row, tile of the row) [capacity, 2] int32, and their number [1] int32."""

    tiles: Tensor
    count: Tensor
    tokens: int  # queries a tile


@dataclass(frozen=True)
class _Shape:
    """Tile sizes and launch settings for one kind of model; nothing of the batch enters."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def _shape(group: int, size: int, value_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> _Shape:
    width = next_power_of_2(max(size, value_size))
    if dtype == torch.float32:
        return _Shape(max(16, next_power_of_2(group)), 16, 4, 2)
    if width > 256:  # Gemma 4's layers that see everything: the sums alone are half of the registers
        return _Shape(max(64, next_power_of_2(group)), 16, 8, 4)
    if width > 128 or group > 64:
        return _Shape(max(128, next_power_of_2(group)), 32, 8, 4)
    return _Shape(128, 64, 8, 5)


@jit_with_runtime("rows", anywhere=("query_start_ptr",))
def _tiles_kernel(
    query_start_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    count_ptr: tl.tensor,
    rows: tl.tensor,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One program a row; the last tiles of a row, which see most keys, come first."""
    row = tl.program_id(0)
    every = tl.arange(0, BLOCK_R)
    begin = tl.load(query_start_ptr + every, mask=every < rows, other=0)
    end = tl.load(query_start_ptr + every + 1, mask=every < rows, other=0)
    counts = tl.cdiv(end - begin, TOKENS)
    place = tl.sum(tl.where(every < row, counts, 0), axis=0)
    mine = tl.sum(tl.where(every == row, counts, 0), axis=0)
    for first in range(0, mine, _LIST_BLOCK):
        at = first + tl.arange(0, _LIST_BLOCK)
        pair = tiles_ptr + (place + at) * 2
        tl.store(pair, at * 0 + row, mask=at < mine)
        tl.store(pair + 1, mine - 1 - at, mask=at < mine)
    if row == 0:
        tl.store(count_ptr, tl.sum(counts, axis=0))


def plan_prefill(query: Tensor, k_cache: Tensor, v_cache: Tensor, query_start: Tensor) -> PrefillPlan:
    """The tiles of a step with these `query_start` [R + 1] int32; the same for all layers of one shape."""
    check_cuda(query, query_start)
    group = query.shape[1] // k_cache.shape[1]
    shape = _shape(group, query.shape[2], v_cache.shape[3], query.dtype, k_cache.dtype)
    tokens, rows = shape.block_m // group, query_start.shape[0] - 1
    capacity = ceil_div(query.shape[0], tokens) + rows
    tiles = torch.empty(capacity, 2, dtype=torch.int32, device=query.device)
    count = torch.zeros(1, dtype=torch.int32, device=query.device)
    if rows:
        _tiles_kernel[(rows,)](
            query_start, tiles, count, rows,
            TOKENS=tokens, BLOCK_R=row_block(rows), num_warps=4,
        )  # fmt: skip
    return PrefillPlan(tiles, count, tokens)


@jit_with_runtime("table_stride", anywhere=("table_ptr", "lengths_ptr", "query_start_ptr"))
def _prefill_kernel(
    query_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    table_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    query_start_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    count_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    v_scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    G: tl.tensor,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    tile, g = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count_ptr):
        return
    row = tl.load(tiles_ptr + tile * 2)
    first_query = tl.load(query_start_ptr + row)
    queries = tl.load(query_start_ptr + row + 1) - first_query
    length = tl.load(lengths_ptr + row)
    m, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    begin = tl.load(tiles_ptr + tile * 2 + 1) * TOKENS
    index = begin + m // GROUP
    real = (m < TOKENS * GROUP) & (index < queries)
    heads = g * GROUP + m % GROUP
    tokens = (first_query + index).to(tl.int64)
    at = query_ptr + tokens[:, None] * query_stride + heads[:, None] * D + d[None, :]
    query = tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    positions = tl.where(real, length - queries + index, -1)

    lowest = length - queries + begin
    highest = length - queries + tl.minimum(begin + TOKENS, queries) - 1
    start = lowest * 0
    whole = (lowest + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        start = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
        whole = start
    k_ptr, v_ptr = k_cache_ptr + g * S * D, v_cache_ptr + g * S * E
    table_ptr += row.to(tl.int64) * table_stride
    top, total, mixed = empty_state(BLOCK_M, BLOCK_E)
    for at_key in tl.range(start, whole, BLOCK_N, num_stages=STAGES):
        top, total, mixed = attend_tile(
            query, top, total, mixed, k_ptr, v_ptr, table_ptr, G * S * D, G * S * E,
            at_key, length, positions, scale, softcap, window,
            S, D, E, BLOCK_D, BLOCK_E, BLOCK_N, False, SOFTCAP, WINDOW,
        )  # fmt: skip
    for at_key in tl.range(whole, highest + 1, BLOCK_N, num_stages=STAGES):
        top, total, mixed = attend_tile(
            query, top, total, mixed, k_ptr, v_ptr, table_ptr, G * S * D, G * S * E,
            at_key, length, positions, scale, softcap, window,
            S, D, E, BLOCK_D, BLOCK_E, BLOCK_N, True, SOFTCAP, WINDOW,
        )  # fmt: skip
    sink = top
    if SINKS:
        sink = tl.load(sinks_ptr + heads, mask=real, other=0.0).to(tl.float32)
    out = finish_state(top, total, mixed, sink, SINKS) * v_scale
    out_at = out_ptr + (tokens[:, None] * G * GROUP + heads[:, None]) * E + e[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (e < E)[None, :])


def paged_attention_prefill(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    plan: PrefillPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention`: query [T, H, D] → [T, H, E]; rows of `out` outside query_start are left.

    `query_start` may begin above 0 when the rows before it are decoded by `paged_attention_decode`; `plan`
    must be of these `query_start`. An fp8 cache holds value / scale (`k_scale`, `v_scale`).
    """
    check_cuda(query, k_cache, v_cache, block_table, seq_lens, query_start)
    heads, d = query.shape[1:]
    kv_heads, size, e = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    shape = _shape(group, d, e, query.dtype, k_cache.dtype)
    if out is None:
        out = torch.empty(query.shape[0], heads, e, dtype=query.dtype, device=query.device)
    plan = plan_prefill(query, k_cache, v_cache, query_start) if plan is None else plan
    if plan.tokens != shape.block_m // group:
        raise ValueError(f"the plan is for tiles of {plan.tokens} queries, not {shape.block_m // group}")
    if plan.tiles.shape[0] == 0:
        return out
    _prefill_kernel[(plan.tiles.shape[0], kv_heads)](
        query, k_cache, v_cache, block_table, seq_lens, query_start, plan.tiles, plan.count,
        query if sinks is None else sinks, out, query.stride(0), block_table.stride(0),
        scale * k_scale, v_scale, softcap, window, kv_heads,
        GROUP=group, TOKENS=plan.tokens, S=size, D=d, E=e, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        BLOCK_D=next_power_of_2(d), BLOCK_E=next_power_of_2(e), STAGES=shape.stages, SOFTCAP=softcap > 0,
        WINDOW=window > 0, SINKS=sinks is not None, num_warps=shape.warps,
    )  # fmt: skip
    return out

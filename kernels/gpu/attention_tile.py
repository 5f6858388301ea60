"""What the decode and the prefill kernel share: one pass of softmax(q k) v over tiles of the paged cache.

A state is (top, total, mixed): the running maximum of the scores in units of log2, the sum of their
exponentials, and the values mixed by them, for each row of a query tile. Tiles and splits begin at multiples
of their size in the sequence, so a row's sums don't depend on where its tile of queries began. Where two
instances of this code must agree to the bit, multiply-adds are written as `tl.fma`: what the compiler fuses
is then the same in both.
"""

from __future__ import annotations

from tokenmill.kernels.gpu.activation import tanh
from tokenmill.kernels.gpu.jit import dot, jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr) -> tl.tensor:
    """The state before any key."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    return top, tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_E), tl.float32)


@jit
def finite(top: tl.tensor) -> tl.tensor:
    """`top` as something to subtract: rows that saw no key yet must not give inf - inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@jit
def merge_states(
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    later_top: tl.tensor,
    later_total: tl.tensor,
    later_mixed: tl.tensor,
) -> tl.tensor:
    """The state over both stretches of keys; a left fold in token order is the one order in use."""
    both = tl.maximum(top, later_top)
    keep, join = tl.exp2(top - finite(both)), tl.exp2(later_top - finite(both))
    total = tl.fma(total, keep, later_total * join)
    mixed = tl.fma(mixed, tl.broadcast_to(keep[:, None], mixed.shape), later_mixed * join[:, None])
    return both, total, mixed


@jit
def finish_state(
    top: tl.tensor, total: tl.tensor, mixed: tl.tensor, sink: tl.tensor, SINKS: tl.constexpr
) -> tl.tensor:
    """The attention output of a state; `sink` [rows] are logits of an extra key whose value is zero."""
    if SINKS:
        sink *= LOG2_E
        both = tl.maximum(top, sink)
        keep = tl.exp2(top - both)
        total = tl.fma(total, keep, tl.exp2(sink - both))
        mixed *= keep[:, None]
    return mixed / tl.where(total > 0, total, 1.0)[:, None]


@jit
def attend_tile(
    query: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    start: tl.tensor,
    length: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """Add keys `start` .. `start + BLOCK_N` to the state of `query` [M, BLOCK_D] at `positions` [M].

    `k_ptr` and `v_ptr` stand at the KV head in block 0, `table_ptr` at the sequence's row of the block table;
    `k_stride` and `v_stride` are elements a block. MASKED False: every row sees every key of the tile.
    """
    tokens = start + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    held = tokens < length
    blocks = tl.load(table_ptr + tokens // S, mask=held, other=0).to(tl.int64)
    at = k_ptr + (blocks * k_stride + tokens % S * D)[:, None] + d[None, :]
    keys = tl.load(at, mask=held[:, None] & (d < D)[None, :], other=0.0)
    at = v_ptr + (blocks * v_stride + tokens % S * E)[:, None] + e[None, :]
    values = tl.load(at, mask=held[:, None] & (e < E)[None, :], other=0.0)

    scores = dot(query, tl.trans(keys.to(query.dtype)), tl.zeros((query.shape[0], BLOCK_N), tl.float32))
    if SOFTCAP:
        scores = softcap * tanh(scores * scale / softcap)
        factor = LOG2_E
    else:
        factor = scale * LOG2_E
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    risen = tl.maximum(top, tl.max(scores, axis=1) * factor)
    shift = finite(risen)
    factors = tl.full(scores.shape, 1.0, tl.float32) * factor
    weights = tl.exp2(tl.fma(scores, factors, tl.broadcast_to(-shift[:, None], scores.shape)))
    keep = tl.exp2(top - shift)
    total = tl.fma(total, keep, tl.sum(weights, axis=1))
    mixed = dot(weights.to(query.dtype), values.to(query.dtype), mixed * keep[:, None])
    return risen, total, mixed

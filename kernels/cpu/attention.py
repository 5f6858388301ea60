"""The paged cache and attention over it on the CPU, twins of `kernels/reference.py`'s.

How keys and values lie inside a cache's blocks is the kernels' own (src/cache_layout.h): it is written by
`store_kv` and `elementwise.rope_store` alone, and whole blocks may be copied. A query row's result is the same
bits however its prompt was chunked and whatever else is in the batch.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import check, required, type_of

_PROBLEM = struct.Struct("@8P8qffii")
"""`Attention` of src/attention.h."""


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys [T, G, D] and values [T, G, E] at `slots` [T] int64 of a layer's cache; negative: nowhere.

    Raises ValueError for shapes or types that don't fit together; slots are the caller's to check.
    """
    tokens, kv_heads, size = key.shape
    blocks, _, block_size, value_size = v_cache.shape
    check(key, "key", (tokens, kv_heads, size))
    check(value, "value", (tokens, kv_heads, value_size), key.dtype)
    check(k_cache, "k_cache", (blocks, kv_heads, block_size, size), key.dtype)
    check(v_cache, "v_cache", (blocks, kv_heads, block_size, value_size), key.dtype)
    check(slots, "slots", (tokens,), torch.int64)
    required().tm_store_kv(
        *(x.data_ptr() for x in (key, value, slots, k_cache, v_cache)),
        *(tokens, kv_heads, block_size, size, value_size, type_of(key)),
    )


def paged_attention(
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
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of `query` [T, H, D] over each sequence's cache; returns [T, H, E].

    `k_cache` [B, G, S, D] and `v_cache` [B, G, S, E], written by these kernels, have the query's type, bfloat16
    or float32; `block_table` [R, P], `seq_lens` [R] and `query_start` [R + 1] are int32. Scores and sums are float32.
    Raises ValueError for shapes or types that don't fit together; block numbers are the caller's to check.
    """
    tokens, heads, key_size = query.shape
    _, kv_heads, block_size, value_size = v_cache.shape
    rows = seq_lens.shape[0]
    check(query, "query", (tokens, heads, key_size))
    check(k_cache, "k_cache", (v_cache.shape[0], kv_heads, block_size, key_size), query.dtype)
    check(v_cache, "v_cache", tuple(v_cache.shape), query.dtype)
    check(block_table, "block_table", (rows, block_table.shape[1]), torch.int32)
    check(seq_lens, "seq_lens", (rows,), torch.int32)
    check(query_start, "query_start", (rows + 1,), torch.int32)
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} KV heads evenly")
    if sinks is not None:
        sinks = check(sinks.float().contiguous(), "sinks", (heads,))
    if out is None:
        out = torch.empty(tokens, heads, value_size, dtype=query.dtype)
    else:
        check(out, "out", (tokens, heads, value_size), query.dtype)
    required().tm_attention(
        _PROBLEM.pack(
            query.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            query_start.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            rows,
            block_table.shape[1],
            heads,
            kv_heads,
            block_size,
            key_size,
            value_size,
            max(window, 0),
            scale,
            softcap,
            type_of(query),
            False,
        )
    )
    return out

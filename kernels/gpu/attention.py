"""Paged attention with the reference's signature: decodes by one kernel, everything longer by the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.attention_decode import DecodePlan, paged_attention_decode
from tokenmill.kernels.gpu.attention_prefill import PrefillPlan, paged_attention_prefill


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    decodes: int = 0,
    decode_plan: DecodePlan | None = None,
    prefill_plan: PrefillPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention` for a mixed batch; returns [T, H, E].

    The first `decodes` rows have exactly one query each, which the host knows when it lays out the step.
    Plans, when given, are of `seq_lens[:decodes]` and of `query_start[decodes:]`.
    """
    if out is None:
        out = torch.empty(
            query.shape[0], query.shape[1], v_cache.shape[3], dtype=query.dtype, device=query.device
        )
    if decodes:
        paged_attention_decode(
            query[:decodes], k_cache, v_cache, block_table[:decodes], seq_lens[:decodes],
            scale=scale, window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
            plan=decode_plan, out=out[:decodes],
        )  # fmt: skip
    if decodes < block_table.shape[0]:
        paged_attention_prefill(
            query, k_cache, v_cache, block_table[decodes:], seq_lens[decodes:], query_start[decodes:],
            scale=scale, window=window, softcap=softcap, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
            plan=prefill_plan, out=out,
        )  # fmt: skip
    return out

"""Everything that writes the paged KV cache: storing keys and values, the fused q/k/v step, block copies.

The fused step reads one row of the QKV linear and leaves nothing else to do before attention:

    qkv row   [ q: H heads * D | k: G heads * D | v: G heads * E ]
                   │ norm, RoPE     │ norm, RoPE     │
                   ▼                ▼                ▼
              q [T, H, D]      k_cache[slot]    v_cache[slot]

A slot of -1 (a padded row of a CUDA graph) stores nothing. An fp8 cache holds value / scale in e4m3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import FP8, FP8_MAX, ceil_div, check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs

_FP8_LIMIT = tl.constexpr(FP8_MAX)
_HEADS_PER_PROGRAM = 4


@jit
def _for_cache(x: tl.tensor, scale: tl.tensor, dtype: tl.constexpr, IS_FP8: tl.constexpr) -> tl.tensor:
    """float32 x as the cache holds it; fp8 saturates instead of turning into NaN."""
    if IS_FP8:
        x = tl.minimum(tl.maximum(x / scale, -_FP8_LIMIT), _FP8_LIMIT)
    return x.to(dtype)


@jit
def _slot_offsets(
    slot: tl.tensor, heads: tl.tensor, G: tl.tensor, S: tl.constexpr, width: tl.constexpr
) -> tl.tensor:
    """Element offsets [heads, 1] of a slot's rows in a contiguous cache [B, G, S, width]."""
    return ((slot // S * G + heads[:, None]) * S + slot % S) * width


@jit
def _store_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    G: tl.tensor,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HEADS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    inside = (heads < G)[:, None] & (d < D)[None, :]
    at = token * key_stride + heads[:, None] * key_head_stride + d[None, :]
    key = _for_cache(
        tl.load(key_ptr + at, mask=inside, other=0.0).to(tl.float32),
        k_scale, k_cache_ptr.dtype.element_ty, IS_FP8,
    )  # fmt: skip
    tl.store(k_cache_ptr + _slot_offsets(slot, heads, G, S, D) + d[None, :], key, mask=inside)
    inside = (heads < G)[:, None] & (e < E)[None, :]
    at = token * value_stride + heads[:, None] * value_head_stride + e[None, :]
    value = _for_cache(
        tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32),
        v_scale, v_cache_ptr.dtype.element_ty, IS_FP8,
    )  # fmt: skip
    tl.store(v_cache_ptr + _slot_offsets(slot, heads, G, S, E) + e[None, :], value, mask=inside)


def store_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write keys [T, G, D] and values [T, G, E] at `slots` [T] int64 of a layer's cache; -1: nowhere."""
    check_cuda(key, value, k_cache, v_cache, slots)
    tokens, kv_heads, d = key.shape
    e = value.shape[2]
    if tokens == 0:
        return
    _store_kernel[(tokens, ceil_div(kv_heads, _HEADS_PER_PROGRAM))](
        key, value, k_cache, v_cache, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), k_scale, v_scale, kv_heads,
        S=k_cache.shape[2], D=d, E=e, BLOCK_D=next_power_of_2(d), BLOCK_E=next_power_of_2(e),
        HEADS=_HEADS_PER_PROGRAM, IS_FP8=k_cache.dtype == FP8, num_warps=4, **launch_options(),
    )  # fmt: skip


@jit
def _normed(
    x: tl.tensor, scale: tl.tensor, weight: tl.tensor, norm_offset: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """RMS norm's last step, rounded as a norm of its own would round it."""
    return (x * scale * (norm_offset + weight)).to(dtype).to(tl.float32)


@jit
def _turned_heads(
    row_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    norm_offset: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    """Heads of one row, normed and turned: [heads, BLOCK_D] float32. `cos_ptr` stands at the token's row.

    Each element is loaded together with its rotation partner (from the L1 cache), which keeps the two
    pairings one expression.
    """
    dtype = row_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        partner, angle, first = d ^ 1, d // 2, d % 2 == 0
    else:
        partner, angle, first = tl.where(d < HALF, d + HALF, d - HALF), d % HALF, d < HALF
    turning = d < 2 * HALF
    partner = tl.where(turning, partner, d)
    inside = (heads < count)[:, None] & (d < D)[None, :]
    at = row_ptr + heads[:, None] * D
    x = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        x = _normed(x, scale, weight, norm_offset, dtype)
        weight = tl.load(weight_ptr + partner, mask=d < D, other=0.0).to(tl.float32)[None, :]
        other = _normed(other, scale, weight, norm_offset, dtype)
    cos = tl.load(cos_ptr + angle, mask=turning, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turning, other=0.0)
    sin = tl.where(first, -sin, sin)
    return x * cos[None, :] + other * sin[None, :]


@jit
def _rope_store_kernel(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    query_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    eps: tl.tensor,
    norm_offset: tl.tensor,
    H: tl.tensor,
    G: tl.tensor,
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    TABLE: tl.constexpr,
    IS_FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query_parts, kv_parts = tl.cdiv(H, HEADS), tl.cdiv(G, HEADS)
    row_ptr = qkv_ptr + token * qkv_stride
    d = tl.arange(0, BLOCK_D)
    angle_row = token
    if TABLE:
        angle_row = tl.load(positions_ptr + token).to(tl.int64)
    cos_ptr += angle_row * HALF
    sin_ptr += angle_row * HALF
    if part < query_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        turned = _turned_heads(
            row_ptr, q_weight_ptr, cos_ptr, sin_ptr, heads, H, eps, norm_offset,
            D, BLOCK_D, HALF, INTERLEAVED, NORM,
        )  # fmt: skip
        query_at = query_ptr + (token * H + heads[:, None]) * D + d[None, :]
        inside = (heads < H)[:, None] & (d < D)[None, :]
        tl.store(query_at, turned.to(query_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            if part < query_parts + kv_parts:
                heads = (part - query_parts) * HEADS + tl.arange(0, HEADS)
                turned = _turned_heads(
                    row_ptr + H * D, k_weight_ptr, cos_ptr, sin_ptr, heads, G, eps, norm_offset,
                    D, BLOCK_D, HALF, INTERLEAVED, NORM,
                )  # fmt: skip
                turned = turned.to(qkv_ptr.dtype.element_ty).to(tl.float32)
                key = _for_cache(turned, k_scale, k_cache_ptr.dtype.element_ty, IS_FP8)
                key_at = k_cache_ptr + _slot_offsets(slot, heads, G, S, D) + d[None, :]
                tl.store(key_at, key, mask=(heads < G)[:, None] & (d < D)[None, :])
            else:
                heads = (part - query_parts - kv_parts) * HEADS + tl.arange(0, HEADS)
                e = tl.arange(0, BLOCK_E)
                held = (heads < G)[:, None] & (e < E)[None, :]
                value_at = row_ptr + (H + G) * D + heads[:, None] * E + e[None, :]
                value = tl.load(value_at, mask=held, other=0.0).to(tl.float32)
                if VALUE_NORM:
                    value *= tl.rsqrt(tl.sum(value * value, axis=1) / E + eps)[:, None]
                    value = value.to(qkv_ptr.dtype.element_ty).to(tl.float32)
                value = _for_cache(value, v_scale, v_cache_ptr.dtype.element_ty, IS_FP8)
                v_cache_at = v_cache_ptr + _slot_offsets(slot, heads, G, S, E) + e[None, :]
                tl.store(v_cache_at, value, mask=held)


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    heads: int,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    value_norm: bool = False,
    stores: bool = True,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Norm, RoPE and KV store of qkv [T, H*D + G*D + G*E] in one pass; returns the queries [T, H, D].

    `cos`, `sin` float32, contiguous: one row of W angles a token, or the whole table [positions, W] when
    `positions` [T] int64 picks the rows. `q_weight` and `k_weight` [D], given together, norm each head (times
    norm_offset + weight) before it turns; `value_norm` norms each value head, without a weight. `slots` [T] int64;
    -1 stores nothing. Unless a layer `stores`, its rows hold queries alone, and there is no `k_weight`.
    """
    check_cuda(qkv, cos, sin, slots, k_cache, v_cache)
    kv_heads, size, d = k_cache.shape[1:]
    kv_heads, e, tokens = kv_heads if stores else 0, v_cache.shape[3], qkv.shape[0]
    if qkv.shape[1] != heads * d + kv_heads * (d + e):
        raise ValueError(f"qkv rows hold {qkv.shape[1]} values, not {heads}*{d} + {kv_heads}*({d}+{e})")
    if stores and (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight are given together or not at all")
    if out is None:
        out = torch.empty(tokens, heads, d, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return out
    per = _HEADS_PER_PROGRAM
    _rope_store_kernel[(tokens, ceil_div(heads, per) + 2 * ceil_div(kv_heads, per))](
        qkv, slots if positions is None else positions, cos, sin, slots,
        qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight,
        out, k_cache, v_cache, qkv.stride(0), k_scale, v_scale, eps, norm_offset, heads, kv_heads,
        S=size, D=d, E=e, BLOCK_D=next_power_of_2(d), BLOCK_E=next_power_of_2(e), HALF=cos.shape[-1],
        HEADS=per, INTERLEAVED=interleaved, NORM=q_weight is not None, VALUE_NORM=value_norm,
        TABLE=positions is not None, IS_FP8=k_cache.dtype == FP8, num_warps=4, **launch_options(),
    )  # fmt: skip
    return out


@jit
def _copy_kernel(
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    k_elements: tl.tensor,
    v_elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    source, target = tl.load(source_ptr + pair).to(tl.int64), tl.load(target_ptr + pair).to(tl.int64)
    if source < 0:
        return
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(k_cache_ptr + source * k_elements + at, mask=at < k_elements, other=0)
    tl.store(k_cache_ptr + target * k_elements + at, keys, mask=at < k_elements)
    values = tl.load(v_cache_ptr + source * v_elements + at, mask=at < v_elements, other=0)
    tl.store(v_cache_ptr + target * v_elements + at, values, mask=at < v_elements)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks inside one layer's cache; `source`, `target` [n] int64, disjoint; -1: no pair."""
    check_cuda(k_cache, v_cache, source, target)
    if source.numel() == 0:
        return
    # Bytes, so that every cache dtype is one kernel.
    k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_elements, v_elements = k_cache[0].numel(), v_cache[0].numel()
    grid = (source.numel(), ceil_div(max(k_elements, v_elements), 8192))
    _copy_kernel[grid](k_cache, v_cache, source, target, k_elements, v_elements, BLOCK=8192, num_warps=8)

"""Mixture of experts: gate/up with its activation, down with the routing weight, and the ordered sum.

    x [T, in] ── by expert ──▶ act(gate) * up [T * k, I]
                                   └── by expert ──▶ weight * down [T * k, out] ── sum over k ──▶ [T, out]

Each pair's row is computed by itself and a token's experts are added best first, so a token's result doesn't
depend on which others chose the same experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.activation import check_activation, gated
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.matmul_tile import accumulate, channel_scale
from tokenmill.kernels.gpu.moe_routing import ExpertTiles, lay_out
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs
from tokenmill.kernels.gpu.quantize import QuantizedWeight, form_of, stored

_FEW_ROWS, _MANY_ROWS = 16, 64


@jit
def _expert_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    count_ptr: tl.tensor,
    pair_weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    scale_stride: tl.tensor,
    TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A tile of pairs of one expert; rows of x are tokens for gate/up (ACTIVATION) and pairs for down."""
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = pairs
    if ACTIVATION != "":
        rows = pairs // TOP
    scale_ptr += expert * scale_stride
    sums, more = accumulate(
        x_ptr, rows * x_stride, pairs >= 0, w_ptr + expert * w_stride, scale_ptr, outputs, N, K, 0, K,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, ACTIVATION != "", FORM=FORM,
    )  # fmt: skip
    valid = outputs < N
    if SCALED:
        sums = channel_scale(sums, scale_ptr, outputs, N)
    if ACTIVATION != "":
        if SCALED:
            more = channel_scale(more, scale_ptr + N, outputs, N)
        if BIAS:
            bias_ptr += expert * 2 * N
            sums += tl.load(bias_ptr + outputs, mask=valid, other=0.0).to(tl.float32)[None, :]
            more += tl.load(bias_ptr + N + outputs, mask=valid, other=0.0).to(tl.float32)[None, :]
        sums = gated(sums, more, ACTIVATION)
    else:
        if BIAS:
            bias = tl.load(bias_ptr + expert * N + outputs, mask=valid, other=0.0).to(tl.float32)
            sums += bias[None, :]
        sums *= tl.load(pair_weights_ptr + pairs, mask=pairs >= 0, other=0.0)[:, None]
    at = out_ptr + pairs[:, None] * N + outputs[None, :]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(pairs >= 0)[:, None] & valid[None, :])


@jit
def _sum_kernel(
    parts_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    TOP: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP):
        width = tl.where(tl.load(ids_ptr + token * TOP + rank) >= 0, N, 0)
        part = parts_ptr + (token * TOP + rank) * N + columns
        sums += tl.load(part, mask=columns < width, other=0.0).to(tl.float32)
    if RESIDUAL:
        sums += tl.load(residual_ptr + token * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + columns, sums.to(out_ptr.dtype.element_ty), mask=columns < N)


def _grouped(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    tiles: ExpertTiles,
    pair_weights: Tensor,
    activation: str | None,
    top: int,
    out: Tensor,
) -> None:
    """One grouped product into `out` [T * top, N]."""
    data, scale, group = stored(weight)
    few = tiles.rows == _FEW_ROWS
    block_k = 2 * group or (128 if few else 64)
    block_n = 32 if few else 64
    _expert_kernel[(tiles.experts.shape[0], ceil_div(out.shape[1], block_n))](
        x, data, scale, x if bias is None else bias, tiles.pairs, tiles.experts, tiles.count, pair_weights,
        out, out.shape[1], x.shape[1], x.stride(0), data.stride(0), scale.stride(0),
        TOP=top, BLOCK_M=tiles.rows, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=group,
        FORM=form_of(weight), STAGES=5 if few else 4,
        SCALED=data is not weight and not group, BIAS=bias is not None, ACTIVATION=activation or "",
        num_warps=4, **launch_options(),
    )  # fmt: skip


def mixture(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activation: str,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile_rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """sum over k of weights[t, k] * down(act(gate(x)) * up(x)) by expert ids[t, k]; x [T, in] → [T, out].

    `ids` [T, top] int32 (-1: none), `weights` [T, top] float32, `gate_up` [X, 2 * I, in] with the gate first,
    `down` [X, out, I], biases [X, 2 * I] and [X, out]; `residual` [T, out] contiguous is added. `tile_rows`
    16 or 64 fixes the tile, and with it each sum's order; by default few rows an expert take 16, many 64.
    """
    check_cuda(x, ids, weights)
    check_activation(activation)
    (tokens, top), (experts, doubled, _) = ids.shape, stored(gate_up)[0].shape
    inner, outputs = doubled // 2, stored(down)[0].shape[1]
    if out is None:
        out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    if tile_rows is None:
        tile_rows = _FEW_ROWS if tokens * top <= 32 * experts else _MANY_ROWS
    if tile_rows not in (_FEW_ROWS, _MANY_ROWS):
        raise ValueError(f"tile_rows must be {_FEW_ROWS} or {_MANY_ROWS}, not {tile_rows}")
    tiles = lay_out(ids, experts, tile_rows)
    hidden = torch.empty(tokens * top, inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(tokens * top, outputs, dtype=x.dtype, device=x.device)
    _grouped(x, gate_up, gate_up_bias, tiles, weights, activation, top, hidden)
    _grouped(hidden, down, down_bias, tiles, weights, None, top, parts)
    block = min(1024, next_power_of_2(outputs))
    _sum_kernel[(tokens, ceil_div(outputs, block))](
        parts, ids, x if residual is None else residual, out, outputs,
        TOP=top, RESIDUAL=residual is not None, BLOCK=block, num_warps=4, **launch_options(),
    )  # fmt: skip
    return out

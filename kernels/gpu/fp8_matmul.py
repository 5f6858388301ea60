"""Linear layers with both operands in e4m3, at twice the matrix units' rate of 16 bits.

    weights [outputs, K] ─┐ tile of outputs x tile of rows, K in steps
    rows    [T, K]       ─┴▶ partial ── every 512 inputs ──▶ sums ─▶ scales, bias, act(gate) * up, residual ─▶ out

Weights are the left operand whatever the number of rows: a group of four warps multiplies 64 of their rows by 8
or more of ours, so few rows fit the instruction that many use. And K is walked in one order, never split. So a
row's result is the same to the bit alone and in any crowd, and the tile may follow the number of rows, as long as
the instruction gives an output the same bits at every width: the self-check asks that of the chip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.activation import check_activation, gated
from tokenmill.kernels.gpu.fp8_rows import Fp8Rows
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, dot, jit, jit_with_runtime, next_power_of_2, tl
from tokenmill.kernels.gpu.matmul_tile import tile_of_program
from tokenmill.kernels.gpu.overlap import launch_options, prefetch, wait_for_inputs
from tokenmill.kernels.gpu.quantize import QuantizedWeight

# Hopper's and Ada's matrix units keep about 14 bits of the running sum of 8-bit products and cut off the rest
# (DeepSeek-V3's report, section 3.3.2). Left in there, which is Triton's default on sm_90 (`max_num_imprecise_acc`
# is 2^30), a sum over 14336 inputs is cut 448 times, each time by half of 2^-13 on average and always toward zero:
# 2.7%. Cut 16 times it loses 0.1%, where rounding the operands costs 3.7%. The other choice that Triton has, the
# result of each tl.dot added in float32 (`max_num_imprecise_acc=BLOCK_K`), loses less than anybody could see and
# halts the matrix units four times as often. Done here rather than by that argument, it holds on Ada too.
_PARTIAL = 512
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Fp8Tile:
    """Rows, weight rows and inputs a tile, and launch settings; `_PARTIAL` is a multiple of `block_k`."""

    rows: int
    outputs: int
    block_k: int
    stages: int
    warps: int


FEW = Fp8Tile(16, 64, 256, 5, 4)
SOME = Fp8Tile(32, 64, 256, 4, 4)
MANY = (Fp8Tile(128, 128, 128, 4, 8), Fp8Tile(64, 128, 128, 4, 8), Fp8Tile(64, 64, 128, 5, 4))
"""Largest first: a larger tile reads less for each multiplication, a smaller one leaves fewer processors idle."""


def tile_for(rows: int, outputs: int) -> Fp8Tile:
    """The tile for `rows` rows and a weight of `outputs` rows: the largest of which nine in ten processors get one."""
    if rows <= SOME.rows:
        return FEW if rows <= FEW.rows else SOME
    for tile in MANY[:-1]:
        tiles = ceil_div(rows, tile.rows) * ceil_div(outputs, tile.outputs)
        if tile.rows < 2 * rows and 10 * tiles >= 9 * _MULTIPROCESSORS:
            return tile
    return MANY[-1]


def interleaved(gate_up: Tensor) -> Tensor:
    """Gate and up rows in turn: [2 * I, ...] with the gate first → the same rows as g0, u0, g1, u1, …"""
    gate, up = gate_up.chunk(2)
    return torch.stack((gate, up), dim=1).flatten(0, 1)


@jit
def _sums(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """w[outputs] x[rows]^T [BLOCK_N, BLOCK_M] float32."""
    w_at, x_at = outputs.to(tl.int64)[:, None] * K, rows.to(tl.int64)[:, None] * K
    there, real = (outputs < N)[:, None], (rows < M)[:, None]
    POLICY: tl.constexpr = "evict_first" if BLOCK_M <= 32 else ""
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        w = tl.load(w_ptr + w_at + k, mask=there & (k < K), other=0.0, eviction_policy=POLICY)
        x = tl.load(x_ptr + x_at + k, mask=real & (k < K), other=0.0)
        partial = dot(w, tl.trans(x), partial)
        if (start + BLOCK_K) % PARTIAL == 0:
            sums += partial
            partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    return sums + partial


@jit_with_runtime("M")
def _fp8_linear_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    residual_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row_tile, output_tile = tile_of_program(BLOCK_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = output_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if PDL:
        prefetch(w_ptr, tl.minimum(outputs, N - 1), K, 0, False, LINES)
    wait_for_inputs(PDL)
    sums = _sums(x_ptr, w_ptr, rows, outputs, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, PARTIAL, STAGES)
    real, there = rows < M, outputs < N
    sums *= tl.load(w_scale_ptr + outputs, mask=there, other=0.0)[:, None]
    sums *= tl.load(x_scale_ptr + rows, mask=real, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + outputs, mask=there, other=0.0).to(tl.float32)[:, None]
    columns, width = outputs, N
    if ACTIVATION != "":
        pairs = tl.permute(tl.reshape(sums, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(pairs)
        sums = gated(gate, up, ACTIVATION)
        columns, width = output_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2), N // 2
    inside = (columns < width)[:, None] & real[None, :]
    line = rows.to(tl.int64)[None, :]
    if RESIDUAL:
        old = residual_ptr + line * residual_stride + columns[:, None]
        sums += tl.load(old, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + line * width + columns[:, None], sums.to(out_ptr.dtype.element_ty), mask=inside)


def fp8_linear(
    x: Fp8Rows,
    weight: QuantizedWeight,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    tile: Fp8Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times weight [out, in] transposed, plus `bias` [out] and `residual` [T, out]; float32 sums.

    `weight` is what `quantize_fp8` makes. With `activation` it and `bias` hold gate and up rows in turn (see
    `interleaved`) and the result is act(gate) * up, [T, out / 2]. `out` may be `residual`. The result is rounded
    once, to `x.dtype`, and doesn't depend on `tile`, which by default follows the number of rows. Inputs that are no
    multiple of 16 can't be copied ahead and make it slow.
    """
    check_cuda(x.data)
    (rows, inputs), (outputs, expected) = x.data.shape, weight.data.shape
    if expected != inputs or weight.data.dtype != x.data.dtype or not weight.data.is_contiguous():
        kind = str(weight.data.dtype).removeprefix("torch.")
        raise ValueError(
            f"a contiguous fp8 weight of {inputs} inputs is needed, not {list(weight.data.shape)} {kind}"
        )
    if activation is not None:
        check_activation(activation)
    if out is None:
        columns = outputs if activation is None else outputs // 2
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.data.device)
    if rows == 0:
        return out
    tile = tile_for(rows, outputs) if tile is None else tile
    _fp8_linear_kernel[(ceil_div(rows, tile.rows), ceil_div(outputs, tile.outputs))](
        x.data, x.scale, weight.data, weight.scale, x.data if bias is None else bias,
        x.data if residual is None else residual, out, rows, outputs, inputs,
        0 if residual is None else residual.stride(0),
        BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.block_k, PARTIAL=_PARTIAL, STAGES=tile.stages,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation or "",
        LINES=min(16, next_power_of_2(inputs // 128)), num_warps=tile.warps, **launch_options(),
    )  # fmt: skip
    return out

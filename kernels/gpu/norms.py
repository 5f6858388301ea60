"""RMS norm, alone, with the residual sum before it or with rounding to 8 bits after it.

A row's sum of squares has one order, here and in the products that norm what they read (skinny_linear.py): lane
j of 1,024 adds the elements j, j + 1024, ... by fused multiplications, and four warps add up the lanes. Triton
decides how; where it decides alike (tests/kernels/test_gpu_compile.py looks) the bits are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.fp8_rows import Fp8Rows, empty_rows, store_row
from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs

LANES = 1024
WARPS = 4
"""Lanes are added up in an order that depends on the number of warps: whoever needs these bits has four."""

_LANES = tl.constexpr(LANES)


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm that a product applies to the rows it reads: times (offset + weight [in])."""

    weight: Tensor
    eps: float
    offset: float = 0.0


@jit
def _load_row(
    x_ptr: tl.tensor,
    at: tl.tensor,
    residual_ptr: tl.tensor,
    residual_at: tl.tensor,
    inside: tl.tensor,
    ADD: tl.constexpr,
) -> tl.tensor:
    """x, or residual + x rounded to the residual's dtype; float32."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + residual_at, mask=inside, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    return x


@jit
def inverse_rms(
    x_ptr: tl.tensor,
    at: tl.tensor,
    residual_ptr: tl.tensor,
    residual_at: tl.tensor,
    real: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tl.tensor:
    """1 / sqrt(mean of squares + eps) of rows at offsets `at` [ROWS], of which `real` exist."""
    squares = tl.zeros((ROWS, _LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * _LANES + tl.arange(0, _LANES)[None, :]
        inside = real[:, None] & (columns < width)
        x = _load_row(x_ptr, at[:, None] + columns, residual_ptr, residual_at[:, None] + columns, inside, ADD)
        squares = tl.fma(x, x, squares)
    return tl.rsqrt(tl.sum(squares, axis=1) / width + eps)


@jit
def normalized(
    x: tl.tensor, scale: tl.tensor, weight: tl.tensor, offset: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """x times the scale of its row times (offset + weight) of its column, rounded to `dtype`."""
    return (x.to(tl.float32) * scale * (offset + weight.to(tl.float32))).to(dtype)


@jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_at, residual_at = row * x_stride, row * residual_stride
    x = _load_row(x_ptr, x_at + columns, residual_ptr, residual_at + columns, inside, ADD)
    one = tl.zeros((1,), tl.int64)
    scale = inverse_rms(
        x_ptr, one + x_at, residual_ptr, one + residual_at, one == 0, width, eps, ADD, 1, CHUNKS
    )
    if ADD:
        tl.store(total_ptr + row * width + columns, x.to(total_ptr.dtype.element_ty), mask=inside)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = normalized(x, scale, weight, offset, x_ptr.dtype.element_ty)
    if ROUND:
        store_row(normed.to(tl.float32), out_ptr + row * width + columns, row_scale_ptr + row, inside)
    else:
        tl.store(out_ptr + row * width + columns, normed, mask=inside)


def _blocks(width: int) -> dict[str, int]:
    """Keyword arguments of a launch over rows of `width`."""
    return {"BLOCK": next_power_of_2(width), "CHUNKS": chunks(width), "num_warps": WARPS}


def chunks(width: int) -> int:
    """How many elements of a row of `width` each lane adds up."""
    return ceil_div(width, LANES)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """RMS norm of x [T, N] in float32, times (offset + weight); `out` [T, N] contiguous, in x's dtype."""
    check_cuda(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows, width = x.shape
    if rows:
        _rms_norm_kernel[(rows,)](
            x, x, weight, out, out, out, width, x.stride(0), 0, eps, offset,
            ADD=False, ROUND=False, **_blocks(width), **launch_options(),
        )  # fmt: skip
    return out


def rms_norm_rows(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Fp8Rows | None = None
) -> Fp8Rows:
    """`quantize_rows` of `rms_norm`, to the bit, in one pass over x [T, N]."""
    check_cuda(x, weight)
    rows, width = x.shape
    out = empty_rows(rows, width, x.dtype, x.device) if out is None else out
    if rows:
        _rms_norm_kernel[(rows,)](
            x, x, weight, out.data, out.data, out.scale, width, x.stride(0), 0, eps, offset,
            ADD=False, ROUND=True, **_blocks(width), **launch_options(),
        )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + x [T, N], rounded to its dtype, and the RMS norm of that sum: (normed, sum).

    `out` and `total` [T, N] are contiguous; `total` may be `residual` itself and `out` may be `x`.
    """
    check_cuda(x, residual, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device) if total is None else total
    rows, width = x.shape
    if rows:
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, total, out, width, x.stride(0), residual.stride(0), eps, offset,
            ADD=True, ROUND=False, **_blocks(width), **launch_options(),
        )  # fmt: skip
    return out, total


@jit
def _norm_add_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + at + columns, mask=inside, other=0.0)
    one = tl.zeros((1,), tl.int64)
    inverse = inverse_rms(x_ptr, one + at, x_ptr, one, one == 0, width, eps, False, 1, CHUNKS)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = normalized(x, inverse, weight, offset, x_ptr.dtype.element_ty).to(tl.float32)
    total = tl.load(residual_ptr + at + columns, mask=inside, other=0.0).to(tl.float32) + normed
    tl.store(out_ptr + at + columns, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


def norm_add(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor, scale: float = 1.0
) -> Tensor:
    """(residual + RMS norm of x) * scale for contiguous x, residual [T, N].

    A `weight` [N / groups] shorter than rows norms each of their groups by itself.
    """
    check_cuda(x, residual, weight)
    out, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.numel()
    rows, left = divmod(x.numel(), width)
    if left or x.shape[-1] % width or x.shape != residual.shape:
        raise ValueError(f"rows {list(x.shape)} and {list(residual.shape)} aren't sums of groups of {width}")
    if rows:
        _norm_add_kernel[(rows,)](
            x, residual, weight, out, width, eps, offset, scale, **_blocks(width), **launch_options()
        )
    return out

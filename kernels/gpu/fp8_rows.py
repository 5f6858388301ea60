"""Activations in 8 bits: each row as e4m3 with a scale of its own, found while it is read.

A row's scale brings its largest magnitude to e4m3's largest value, 448, so nothing saturates, and neither its
codes nor its scale depend on the other rows. A row with NaN or infinity in it gets NaN for a scale: its codes
say nothing then, and whatever is multiplied by the scale shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import FP8, FP8_MAX, INTERPRETED, check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs

SMALLEST = 1e-30
"""The least that counts as a row's largest magnitude, so that a row of zeros divides by no zero."""

_LARGEST = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)
_TRUNCATES = tl.constexpr(INTERPRETED)


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of activations: `data * scale[:, None]` is what they stand for."""

    data: Tensor  # [T, in] float8_e4m3fn, contiguous
    scale: Tensor  # [T] float32
    dtype: torch.dtype
    """What the rows were before, and what a product of them comes out in."""


@jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """float32 x, at most 448 in magnitude, on e4m3's grid: nearest, ties to even.

    Adding 1.5 * 2^23 grid steps leaves float32 no finer place than the grid; below 2^-6 the steps stay 2^-9.
    """
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    steps = tl.maximum(binade, 0.015625) * 1572864.0
    return (x + steps) - steps


@jit
def to_fp8(x: tl.tensor) -> tl.tensor:
    """float32 x, at most 448 in magnitude, as e4m3 rounded to nearest even."""
    if _TRUNCATES:
        # The chip's conversion rounds by itself, the interpreter's drops the bits that don't fit.
        x = _nearest(x)
    return x.to(tl.float8e4nv)


@jit
def store_row(x: tl.tensor, data_ptr: tl.tensor, scale_ptr: tl.tensor, inside: tl.tensor) -> None:
    """Round and store one row: float32 x [BLOCK], of which `inside` is the row and the rest zeros.

    `data_ptr` [BLOCK] are the places of its codes, `scale_ptr` the place of its scale.
    """
    magnitude = tl.abs(x)
    largest = tl.maximum(tl.max(magnitude, axis=0), _SMALLEST)
    # NaN is not below infinity; a maximum of numbers and NaN may be either.
    finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=0) != 0
    tl.store(scale_ptr, tl.where(finite, tl.div_rn(largest, _LARGEST), float("nan")))
    codes = tl.where(finite, x * tl.div_rn(_LARGEST, largest), 0.0)
    # The product may lie past the largest code by a bit, where the interpreter doesn't saturate.
    tl.store(data_ptr, to_fp8(tl.clamp(codes, -_LARGEST, _LARGEST)), mask=inside)


@jit
def _quantize_rows_kernel(
    x_ptr: tl.tensor,
    data_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    store_row(x, data_ptr + row * width + columns, scale_ptr + row, inside)


def empty_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Fp8Rows:
    """Room for `rows` rows of `width` elements that were of `dtype`."""
    return Fp8Rows(
        torch.empty(rows, width, dtype=FP8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        dtype,
    )


def quantize_rows(x: Tensor, *, out: Fp8Rows | None = None) -> Fp8Rows:
    """x [T, in], its elements side by side within a row, in e4m3 with a scale a row."""
    check_cuda(x)
    rows, width = x.shape
    if x.stride(1) != 1 and width > 1:
        raise ValueError(f"rows of elements side by side are needed, not strides {list(x.stride())}")
    out = empty_rows(rows, width, x.dtype, x.device) if out is None else out
    if rows:
        block = next_power_of_2(width)
        _quantize_rows_kernel[(rows,)](
            x, out.data, out.scale, width, x.stride(0),
            BLOCK=block, num_warps=min(32, max(1, block // 512)), **launch_options(),
        )  # fmt: skip
    return out

"""RMS norm, alone, with the residual sum before it or with rounding to 8 bits after it.

One program a row, so a row's result stands alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.fp8_rows import Fp8Rows, empty_rows, store_row
from tokenmill.kernels.gpu.jit import check_cuda, jit, next_power_of_2, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs


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
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale * (offset + weight)).to(x_ptr.dtype.element_ty)
    if ROUND:
        store_row(normed.to(tl.float32), out_ptr + row * width + columns, row_scale_ptr + row, inside)
    else:
        tl.store(out_ptr + row * width + columns, normed, mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> Tensor:
    """RMS norm of x [T, N] in float32, times (offset + weight); `out` [T, N] contiguous, in x's dtype."""
    check_cuda(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows, width = x.shape
    if rows:
        block = next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            x, x, weight, out, out, out, width, x.stride(0), 0, eps, offset,
            ADD=False, ROUND=False, BLOCK=block, num_warps=_warps(block), **launch_options(),
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
        block = next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            x, x, weight, out.data, out.data, out.scale, width, x.stride(0), 0, eps, offset,
            ADD=False, ROUND=True, BLOCK=block, num_warps=_warps(block), **launch_options(),
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
        block = next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, total, out, width, x.stride(0), residual.stride(0), eps, offset,
            ADD=True, ROUND=False, BLOCK=block, num_warps=_warps(block), **launch_options(),
        )  # fmt: skip
    return out, total

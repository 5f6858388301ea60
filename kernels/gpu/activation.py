"""act(gate) * up over the output of the fused gate/up linear, or of two tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import ceil_div, check_cuda, jit, tl
from tokenmill.kernels.gpu.overlap import launch_options, wait_for_inputs

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")


@jit
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh by the exponential: saturates without overflow, absolute error near 1e-7."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """silu, gelu or gelu_tanh of float32 x."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@jit
def gated(gate: tl.tensor, up: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(gate) * up of float32 values; swiglu_oai is gpt-oss's, as `reference.activation_mul` says it."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        return activate(gate, ACTIVATION) * up


@jit
def _activation_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = gate_up_ptr + row * stride + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    product = gated(gate, up, ACTIVATION)
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


def check_activation(activation: str) -> None:
    """Raise ValueError for a name that the kernels don't know."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def activation_mul(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """act(gate) * up for gate_up [T, 2 * I] (gate first) → [T, I]; `activation` is one of `ACTIVATIONS`."""
    check_cuda(gate_up)
    check_activation(activation)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, ceil_div(width, 1024))
        _activation_mul_kernel[grid](
            gate_up, out, width, gate_up.stride(0),
            ACTIVATION=activation, BLOCK=1024, num_warps=4, **launch_options(),
        )  # fmt: skip
    return out


@jit
def _act_mul_kernel(
    x_ptr: tl.tensor,
    other_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    other_stride: tl.tensor,
    start: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + row * other_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
    product = activate(x, ACTIVATION) * other
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


def act_mul(x: Tensor, other: Tensor, start: int, activation: str) -> Tensor:
    """act(x) * columns `start` and after of `other`, for x [T, W]; silu, gelu or gelu_tanh."""
    check_cuda(x, other)
    check_activation(activation)
    rows, width = x.shape
    if not 0 <= start <= other.shape[1] - width:
        raise ValueError(f"rows of {other.shape[1]} have no {width} columns from {start} on")
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _act_mul_kernel[(rows, ceil_div(width, 1024))](
            x, other, out, width, x.stride(0), other.stride(0), start,
            ACTIVATION=activation, BLOCK=1024, num_warps=4, **launch_options(),
        )  # fmt: skip
    return out

"""Plain-torch twins of what `kernels/reference.py` has none for: linears with epilogues and expert layers."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels import reference
from tokenmill.kernels.gpu.fp8_rows import SMALLEST, Fp8Rows
from tokenmill.kernels.gpu.jit import FP8, FP8_MAX
from tokenmill.kernels.gpu.norms import RowNorm
from tokenmill.kernels.gpu.quantize import QuantizedWeight


def _wide(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantized() if isinstance(weight, QuantizedWeight) else weight.float()


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    norm: RowNorm | None = None,
) -> Tensor:
    """Twin of `skinny_linear.linear`, in float32 throughout and rounded once, after the norm too."""
    x = x if norm is None else reference.rms_norm(x, norm.weight, norm.eps, norm.offset)
    out = x.float() @ _wide(weight).T
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = reference.activation_mul(out, activation)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Twin of `fp8_rows.quantize_rows`, to the bit."""
    wide = x.float()
    finite = torch.isfinite(wide).all(1)
    largest = wide.abs().nan_to_num(0.0).amax(1).clamp(min=SMALLEST) if x.shape[1] else wide.new_zeros(len(x))
    # A number divided by a tensor would be a product with its rounded reciprocal.
    per_unit = torch.where(finite, torch.full_like(largest, FP8_MAX) / largest, 0.0)
    codes = torch.where(finite[:, None], wide, 0.0) * per_unit[:, None]
    scale = torch.where(finite, largest / FP8_MAX, float("nan"))
    return Fp8Rows(codes.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale, x.dtype)


def fp8_linear(
    x: Fp8Rows,
    weight: QuantizedWeight,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Twin of `fp8_matmul.fp8_linear`, in float32 throughout and rounded once."""
    out = x.data.float() @ weight.data.float().T * weight.scale * x.scale[:, None]
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = reference.activation_mul(torch.cat((out[:, 0::2], out[:, 1::2]), dim=1), activation)
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)


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
) -> Tensor:
    """Twin of `moe.mixture`, token by token in float32."""
    first, second = _wide(gate_up), _wide(down)
    out = torch.zeros(x.shape[0], second.shape[1], device=x.device)
    for token, (experts, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for rank, expert in enumerate(experts):
            if expert < 0:
                continue
            hidden = first[expert] @ x[token].float()
            if gate_up_bias is not None:
                hidden = hidden + gate_up_bias[expert].float()
            result = second[expert] @ reference.activation_mul(hidden[None], activation)[0]
            if down_bias is not None:
                result = result + down_bias[expert].float()
            out[token] += shares[rank] * result
    if residual is not None:
        out = out + residual.float()
    return out.to(x.dtype)

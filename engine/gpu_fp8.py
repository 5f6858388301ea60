"""Products with both operands in 8-bit floats: `quantization: fp8_dynamic`.

    x [T, in] ── quantize_rows ──▶ e4m3 rows, a scale each ──▶ product with e4m3 weights, a scale an output
    x [T, in] ── rms_norm_rows ──▶ the same, rounded by the norm before

A row gives the same bits whatever rows come with it, `deterministic` or not (kernels/gpu/fp8_matmul.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokenmill.kernels import gpu

if TYPE_CHECKING:
    from tokenmill.kernels.gpu.fp8_rows import Fp8Rows


class Fp8Linear:
    """A weight [out, in], rounded at load, with what follows its product; `gate`: gate rows first, then up."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gate: str | None) -> None:
        if gate is not None:
            weight = gpu.interleaved(weight)
            bias = None if bias is None else gpu.interleaved(bias)
        self.weight, self.bias, self.gate = gpu.quantize_fp8(weight), bias, gate

    def __call__(
        self, x: Tensor | Fp8Rows, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x [T, in], rounded or to be rounded, residual [T, out] or None → [T, out], in `out` if given."""
        rows = gpu.quantize_rows(x if x.stride(1) == 1 else x.contiguous()) if isinstance(x, Tensor) else x
        result: Tensor = gpu.fp8_linear(
            rows, self.weight, bias=self.bias, activation=self.gate, residual=residual, out=out
        )
        return result

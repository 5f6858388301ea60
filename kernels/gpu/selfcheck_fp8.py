"""The self-check's part on products with both operands in 8 bits.

Each comparison is (name, relative error, allowed error); 0 allowed means equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu import reference_gpu
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.fp8_matmul import FEW, MANY, SOME
from tokenmill.kernels.gpu.fp8_rows import Fp8Rows

Comparison = tuple[str, float, float]

TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}
"""The rounding of the result, or that of sums of which the matrix unit keeps some 14 bits."""


def _rows_error(mine: Fp8Rows, expected: Fp8Rows) -> float:
    return max(relative_error(mine.data, expected.data), relative_error(mine.scale, expected.scale))


def compare_with_reference(
    generator: torch.Generator, device: torch.device, dtypes: Sequence[torch.dtype], rows: int, inputs: int
) -> Iterator[Comparison]:
    """Rounding alone and behind a norm, and each epilogue of the product, in all tiles."""
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
        rounded, norm = gpu.quantize_rows(x), torch.randn(inputs, generator=generator).to(device, dtype)
        yield f"quantize_rows {kind}", _rows_error(rounded, reference_gpu.quantize_rows(x)), 0.0
        both = gpu.rms_norm_rows(x, norm, 1e-5), gpu.quantize_rows(gpu.rms_norm(x, norm, 1e-5))
        yield f"rms_norm_rows = quantize_rows of rms_norm {kind}", _rows_error(*both), 0.0
        weight = gpu.quantize_fp8(torch.randn(194, inputs, generator=generator).to(device))
        residual = torch.randn(rows, 194, generator=generator).to(device, dtype)
        settings: dict[str, dict[str, Any]] = {
            "residual": {"residual": residual},
            "gated": {"activation": "silu", "bias": torch.randn(194, generator=generator).to(device)},
        }
        for name, keywords in settings.items():
            expected = reference_gpu.fp8_linear(rounded, weight, **keywords)
            for tile in (FEW, SOME, *MANY):
                out = poisoned(*expected.shape, dtype=dtype, device=device)
                gpu.fp8_linear(rounded, weight, **keywords, tile=tile, out=out)
                what = f"fp8_linear {kind} {name}, tiles of {tile.rows} x {tile.outputs}"
                yield what, relative_error(out, expected), TOLERANCE[dtype]


def compare_crowds(
    generator: torch.Generator, device: torch.device, inputs: int, outputs: int
) -> Iterator[Comparison]:
    """A row alone and in any crowd, in tiles of any size: on a GPU the same to the bit."""
    rows = gpu.quantize_rows(torch.randn(300, inputs, generator=generator).to(device, torch.bfloat16))
    weight = gpu.quantize_fp8(torch.randn(outputs, inputs, generator=generator).to(device))

    def product(count: int, **keywords: Any) -> Tensor:
        some = Fp8Rows(rows.data[:count], rows.scale[:count], rows.dtype)
        out: Tensor = gpu.fp8_linear(some, weight, activation="silu", **keywords)
        return out

    every = product(300, tile=MANY[0])
    for tile in (FEW, SOME, *MANY[1:]):
        name = f"fp8_linear: tiles of {tile.rows} x {tile.outputs} = of {MANY[0].rows} x {MANY[0].outputs}"
        yield name, relative_error(product(300, tile=tile), every), 0.0
    for count in (1, 16, 17, 64, 65, 200):
        yield f"fp8_linear: {count} rows = in a crowd", relative_error(product(count), every[:count]), 0.0

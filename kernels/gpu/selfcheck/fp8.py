"""Products with both operands in 8 bits, and the rounding before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu import reference_gpu
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.fp8_matmul import FEW, MANY, SOME
from tokenmill.kernels.gpu.fp8_rows import Fp8Rows
from tokenmill.kernels.gpu.selfcheck.trial import CheckResult, Trial, label

TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}
"""The rounding of the result, or that of sums of which the matrix unit keeps some 14 bits."""


def _rows_error(mine: Fp8Rows, expected: Fp8Rows) -> float:
    return max(relative_error(mine.data, expected.data), relative_error(mine.scale, expected.scale))


def epilogues(trial: Trial) -> Iterator[CheckResult]:
    """Rounding alone and behind a norm, and each epilogue of the product, in all tiles."""
    rows, inputs = trial.rows, 3 * trial.width + 16
    for dtype in trial.dtypes:
        x, norm = trial.randn(rows, inputs, dtype=dtype), trial.randn(inputs, dtype=dtype)
        rounded = gpu.quantize_rows(x)
        error = _rows_error(rounded, reference_gpu.quantize_rows(x))
        yield CheckResult(label("quantize_rows", dtype), error, 0.0)
        both = gpu.rms_norm_rows(x, norm, 1e-5), gpu.quantize_rows(gpu.rms_norm(x, norm, 1e-5))
        name = label("rms_norm_rows = quantize_rows of rms_norm", dtype)
        yield CheckResult(name, _rows_error(*both), 0.0)
        weight = gpu.quantize_fp8(trial.randn(194, inputs))
        settings: dict[str, dict[str, Any]] = {
            "residual": {"residual": trial.randn(rows, 194, dtype=dtype)},
            "gated": {"activation": "silu", "bias": trial.randn(194)},
        }
        for epilogue, keywords in settings.items():
            expected = reference_gpu.fp8_linear(rounded, weight, **keywords)
            for tile in (FEW, SOME, *MANY):
                out = poisoned(*expected.shape, dtype=dtype, device=trial.device)
                gpu.fp8_linear(rounded, weight, **keywords, tile=tile, out=out)
                detail = f"{epilogue}, tiles of {tile.rows} x {tile.outputs}"
                error = relative_error(out, expected)
                yield CheckResult(label("fp8_linear", dtype, detail), error, TOLERANCE[dtype])


def crowds(trial: Trial, outputs: int = 4096) -> Iterator[CheckResult]:
    """A row alone and in any crowd, in tiles of any size: on a GPU the same to the bit."""
    rows = gpu.quantize_rows(trial.randn(300, trial.width, dtype=torch.bfloat16))
    weight = gpu.quantize_fp8(trial.randn(outputs, trial.width))

    def product(count: int, **keywords: Any) -> Tensor:
        some = Fp8Rows(rows.data[:count], rows.scale[:count], rows.dtype)
        out: Tensor = gpu.fp8_linear(some, weight, activation="silu", **keywords)
        return out

    every = product(300, tile=MANY[0])
    for tile in (FEW, SOME, *MANY[1:]):
        name = f"fp8_linear: tiles of {tile.rows} x {tile.outputs} = of {MANY[0].rows} x {MANY[0].outputs}"
        yield CheckResult(name, relative_error(product(300, tile=tile), every), 0.0)
    for count in (1, 16, 17, 64, 65, 200):
        error = relative_error(product(count), every[:count])
        yield CheckResult(f"fp8_linear: {count} rows = in a crowd", error, 0.0)

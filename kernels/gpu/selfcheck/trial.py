"""What all comparisons share: random inputs and their sizes, how a result is named, what error is allowed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import INTERPRETED

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2 if INTERPRETED else 1.2e-2}
"""Allowed ‖out - reference‖ / ‖reference‖, the reference's own rounding included. The interpreter truncates to bfloat16
where the chip rounds to nearest."""


@dataclass(frozen=True)
class CheckResult:
    """One comparison: a relative error, or the share of rows that differ."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Trial:
    """Where the inputs come from and how large they are."""

    device: torch.device
    generator: torch.Generator
    dtypes: tuple[torch.dtype, ...]
    rows: int  # rows of logits, tokens
    width: int  # hidden size
    vocabulary: int
    context: int
    outputs: int  # of the widest product
    shapes: slice  # of the shapes of attention

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def make_trial(device: torch.device, seed: int) -> Trial:
    """Small inputs under the interpreter, true sizes on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    if INTERPRETED:
        return Trial(device, generator, (torch.bfloat16,), 3, 200, 1500, 100, 96, slice(1, None, 3))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return Trial(device, generator, dtypes, 33, 4096, 128256, 5000, 512, slice(None))


def label(kernel: str, dtype: torch.dtype, detail: str = "") -> str:
    """A result's name."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {detail}".strip()


def differing(out: Tensor, expected: Tensor) -> float:
    """Share of rows that aren't equal bit for bit."""
    rows = max(1, out.shape[0])
    return float((out.flatten(1) != expected.flatten(1)).any(1).sum()) / rows

"""Programmatic dependent launch: a kernel begins while the one before it drains, and waits where it must.

    without  │ kernel A ░░│  launch  │ kernel B            │        ░ the last programs, the chip half empty
    with     │ kernel A ░░│ kernel B                       │
                     │▓▓▓▓│ B's programs have started, asked for their weights, and wait for A's results

A decode step is some hundred short kernels, so the gaps between them are what keeps it from the memory's
speed. Inside `overlapping_launches()` (around the capture of a graph, say) the kernels of the step are
launched so; each waits at its top, before it reads or writes anything that another kernel touches. It changes
no result, and needs Hopper or later. The interpreter has no such thing and never sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokenmill.kernels.gpu.jit import INTERPRETED, jit, tl

_LINE = tl.constexpr(128)
_enabled = False


@contextmanager
def overlapping_launches(enabled: bool = True) -> Iterator[None]:
    """Launch the decode step's kernels with programmatic dependent launch inside this block."""
    global _enabled
    before, _enabled = _enabled, enabled and not INTERPRETED
    try:
        yield
    finally:
        _enabled = before


def supports_overlap(device: torch.device) -> bool:
    """Whether the device's kernels can begin before the last ones have ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options() -> dict[str, bool]:
    """Keyword arguments of a launch whose kernel has a PDL parameter."""
    return {"PDL": True, "launch_pdl": True} if _enabled else {"PDL": False}


@jit
def wait_for_inputs(PDL: tl.constexpr) -> None:
    """Let the next kernel begin, then wait until everything before this one is done and visible."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(
    ptr: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    HALVED: tl.constexpr,
    LINES: tl.constexpr,
) -> None:
    """Ask for LINES cache lines of each of `rows` [n] of a matrix of `width` columns, from column `first` on.

    HALVED: two columns a byte. What lies past a row's end is its last byte again.
    """
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    row_bytes, first_byte = width * SIZE, first * SIZE
    if HALVED:
        row_bytes, first_byte = width // 2, first // 2
    ahead = tl.minimum(first_byte + tl.arange(0, LINES) * _LINE, row_bytes - 1).to(tl.int64)
    addresses = ptr.to(tl.int64) + rows.to(tl.int64)[:, None] * row_bytes + ahead[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )

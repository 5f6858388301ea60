"""The one door to Triton: the typed `jit` decorator, what the interpreter needs, and the toolchain's check.

Every kernel module imports `tl` from here, so Triton (which ships no types) is imported in one place. With
TRITON_INTERPRET=1 set before the first import the kernels run on CPU tensors, program after program; that is
how the tests run them where there is no GPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Triton 3.9 warns when this is unset. Fusion stays on: where two code paths must agree to the bit, the
# kernels write `tl.fma` themselves.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl

__all__ = [
    "FP8",
    "FP8_MAX",
    "INTERPRETED",
    "as_operand",
    "ceil_div",
    "check_cuda",
    "check_toolchain",
    "dot",
    "jit",
    "jit_with_runtime",
    "multiprocessors",
    "next_power_of_2",
    "row_block",
    "tl",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DOT_IN_FLOAT32 = tl.constexpr(INTERPRETED)
"""The interpreter keeps bfloat16 as 16-bit integers, so its `tl.dot` needs float32 operands."""

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def _keyed(kernel: Any) -> Any:
    """The kernel, its key in Triton's cache made now, after those of what it calls, which stands above it.

    In Triton 3.6 a key depends on which of these were made before: made at the first launch, it would differ from
    process to process.
    """
    if not INTERPRETED:
        _ = kernel.cache_key
    return kernel


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` with a type."""
    return _keyed(triton.jit(function))


def jit_with_runtime(*names: str, anywhere: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`jit`, but the integers `names` make no variants of their own: those that change from step to step.

    Triton otherwise compiles once for 1, once for multiples of 16 and once for the rest. Pointers, too, have two
    variants, at multiples of 16 bytes and elsewhere: those named in `anywhere`, of which few bytes are read and
    which point into the middle of a step's arrays, have one.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = triton.jit(
            function, do_not_specialize=list(names), do_not_specialize_on_alignment=list(anywhere)
        )
        return _keyed(kernel)

    return decorate


def row_block(rows: int) -> int:
    """The length of a vector over a step's `rows`: of few sizes, since each is a kernel to compile."""
    return 16 if rows <= 16 else max(256, next_power_of_2(rows))


@jit
def as_operand(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A narrower x as an operand of `dot` beside one of `dtype`, which holds its values exactly."""
    if DOT_IN_FLOAT32:
        return x.to(tl.float32)
    else:
        return x.to(dtype)


@jit
def dot(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor) -> tl.tensor:
    """accumulator + a @ b in float32, without TF32 rounding of float32 operands."""
    if DOT_IN_FLOAT32:
        # numpy adds in another order where an operand's rows are one row repeated; a product is a copy.
        a = a.to(tl.float32) * 1.0
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for 0."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors the device has; an H200's 132 where there is no GPU to ask.

    Few for the interpreter, which runs one program after the other: those that find nothing to do take their time.
    """
    if INTERPRETED:
        return 16
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check_cuda(*tensors: Tensor) -> None:
    """Raise ValueError for a tensor in host memory, which a kernel would read as a wild address."""
    for tensor in tensors:
        if tensor.device.type == "cpu" and not INTERPRETED:
            raise ValueError(
                f"the GPU kernels need CUDA tensors, not {tensor.device} (or TRITON_INTERPRET=1)"
            )


def check_toolchain() -> str | None:
    """Why Triton can't compile here, in one line, or None. It builds its launchers with a C compiler."""
    if INTERPRETED:
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "Triton needs a C compiler at run time: install gcc, or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        return f"Triton needs Python's headers at run time ({header.name} is missing): install python3-dev"
    return None

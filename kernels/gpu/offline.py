"""Compile the kernels for a chip that isn't there: Triton carries NVIDIA's assembler, so none is needed.

Inside `compiling_for(90)` every launch compiles instead of running, on tensors of the meta device, and its
registers, spills and shared memory are read from the finished machine code. What fits a chip is so known
before one is at hand; what it computes is the interpreter's and the self-check's business.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver as active_driver
from triton.runtime.jit import JITFunction

META = torch.device("meta")


@dataclass(frozen=True)
class CompiledKernel:
    """What the machine code of one specialisation asks of the chip; `stack` bytes a thread mean spills."""

    name: str
    warps: int
    shared: int
    registers: int
    stack: int
    row_sums: list[str]
    """The layouts in which rows of 1,024 lanes are added up, and with them the order of their sums."""
    ptx: str


class AbsentChip(DriverBase):  # type: ignore[misc]
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return META

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on a chip that isn't there")

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int = 90) -> Iterator[list[CompiledKernel]]:
    """Turn launches into compilations for `capability`; yields the list that collects their results."""
    compiled: list[CompiledKernel] = []
    seen: set[int] = set()
    run, previous = JITFunction.run, active_driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None and id(kernel) not in seen:
            seen.add(id(kernel))
            compiled.append(_describe(self.__name__, kernel))
        return kernel

    active_driver.set_active(AbsentChip(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        active_driver._active = previous


def _describe(name: str, kernel: Any) -> CompiledKernel:
    """Read the resources out of the cubin with the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump said nothing of {name}: {usage[:200]!r}")
    return CompiledKernel(
        name=name.lstrip("_"),
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        registers=int(registers[1]),
        stack=int(stack[1]),
        row_sums=_row_sums(kernel.asm["ttgir"]),
        ptx=kernel.asm["ptx"],
    )


def _row_sums(code: str) -> list[str]:
    """Layouts of the operands of reductions over 1,024 float32 lanes, as Triton's own code spells them."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    found = re.findall(r"\(tensor<\d+x1024xf32, (#\w+)>\) -> tensor<\d+xf32", code)
    return sorted({str(layouts[name]) for name in found})

"""The instruction sets that the kernels are compiled for, and which of them this machine has."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class InstructionSet:
    """A name, the CPU flags it needs (as Linux spells them) and what the compiler is told."""

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX2_OPTIONS = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
_AVX512_OPTIONS = (
    *_AVX2_OPTIONS,
    *("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
)

X86 = (
    InstructionSet(
        "amx",
        _AVX512 | {"avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"},
        (*_AVX512_OPTIONS, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
    ),
    InstructionSet(
        "avx512_bf16",
        _AVX512 | {"avx512_bf16", "avx512_vnni"},
        (*_AVX512_OPTIONS, "-mavx512bf16", "-mavx512vnni"),
    ),
    InstructionSet("avx512_vnni", _AVX512 | {"avx512_vnni"}, (*_AVX512_OPTIONS, "-mavx512vnni")),
    InstructionSet("avx512", _AVX512, _AVX512_OPTIONS),
    InstructionSet("avx2", _AVX2, _AVX2_OPTIONS),
)
NEON = InstructionSet("neon", frozenset(), ())
PORTABLE = InstructionSet("portable", frozenset(), ())


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's flags that the operating system lets programs use; empty where it doesn't list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset()
    )


@cache
def supported() -> tuple[InstructionSet, ...]:
    """The sets that this machine runs, the best first; the last one is plain C++."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return (NEON,)
    return (*(each for each in X86 if each.needs <= cpu_flags()), PORTABLE)


def to_try(sets: Iterable[InstructionSet]) -> tuple[InstructionSet, ...]:
    """All of a machine's sets, or the one of them that TOKENMILL_ISA names; ValueError where it names another."""
    every = tuple(sets)
    name = os.environ.get("TOKENMILL_ISA")
    if not name:
        return every
    if not (named := tuple(isa for isa in every if isa.name == name)):
        choices = ", ".join(isa.name for isa in every)
        raise ValueError(f"TOKENMILL_ISA must be a set that this machine has ({choices}), not {name}")
    return named

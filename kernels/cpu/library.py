"""The compiled kernels: chosen for this machine, loaded once, called without the GIL.

`current()` builds on first use (seconds, then cached) and returns None where that isn't possible, after one
warning; callers then run plain torch. Which instruction set is in use never changes the packed layouts.
TOKENMILL_ISA=amx, avx512_bf16, avx512_vnni, avx512, avx2, neon or portable in the environment names the only set to
try: to look for a fault, or to measure what another machine would do.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from tokenmill.kernels.cpu.build import BuildError, built
from tokenmill.kernels.cpu.isa import InstructionSet, supported, to_try

log = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 0, torch.float32: 1}
"""Element types of activations, as src/api.h numbers them."""

ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "swiglu_oai": 4}
"""Gate functions, as src/vmath.h numbers them."""

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "tm_probe": (c_int, ()),
    "tm_set_threads": (None, (c_int,)),
    "tm_threads": (c_int, ()),
    "tm_packed_bytes": (c_int64, (c_void_p,)),
    "tm_pairs": (c_int64, (c_void_p,)),
    "tm_pack": (None, (c_void_p, c_void_p, c_void_p)),
    "tm_pack_coded": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64)),
    "tm_pack_columns": (None, (c_void_p, c_void_p, c_void_p)),
    "tm_pack_quantized": (None, (c_void_p, c_int, c_void_p, c_void_p)),
    "tm_rows": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int)),
    "tm_rms_norm": (None, (*(c_void_p,) * 5, c_int64, c_int64, c_float, c_float, c_int, c_int)),
    "tm_layer_norm": (None, (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_int)),
    "tm_norm_whole": (None, (*(c_void_p,) * 4, *(c_int64,) * 4, c_float, c_float, c_int)),
    "tm_activate": (None, (c_void_p, c_void_p, c_int64, c_int, c_int)),
    "tm_rope_store": (None, (c_void_p,)),
    "tm_activation_mul": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int, c_int)),
    "tm_gate_add": (None, (*(c_void_p,) * 4, c_int64, c_int64, c_int)),
    "tm_store_kv": (None, (*(c_void_p,) * 5, *(c_int64,) * 5, c_int)),
    "tm_gather_rows": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64)),
    "tm_sample": (None, (c_void_p,)),
    "tm_gumbel": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p)),
    "tm_token_logprobs": (None, (c_void_p, c_int, c_int64, c_int64, c_void_p, c_int64, *(c_void_p,) * 3)),
    "tm_penalties": (None, (c_void_p, c_int64, c_int64, *(c_void_p,) * 6)),
    "tm_bitmask": (None, (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64)),
    "tm_attention": (None, (c_void_p,)),
    "tm_linear": (None, (c_void_p, c_void_p, c_int, c_int, c_int64, c_void_p, c_void_p, c_int, c_int)),
    "tm_route": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "tm_mixture": (
        None,
        (c_void_p, c_void_p, c_int, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "tm_causal_conv": (None, (*(c_void_p,) * 5, c_int)),
    "tm_recur": (None, (*(c_void_p,) * 6, c_int)),
    "tm_gated_norm": (None, (*(c_void_p,) * 4, c_int64, c_int64, c_int64, c_int)),
    "tm_norm_add": (None, (*(c_void_p,) * 4, c_int64, c_int64, c_float, c_float, c_float, c_int)),
    "tm_act_mul": (None, (*(c_void_p,) * 3, *(c_int64,) * 4, c_int, c_int)),
    "tm_gate_mul": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int)),
    "tm_run_tape": (None, (c_void_p, c_int64, c_void_p, c_void_p)),
}


class Library(ctypes.CDLL):
    """One loaded build. Its functions take addresses and sizes; the modules beside this one know shapes."""

    def __init__(self, isa: InstructionSet) -> None:
        with built(isa) as (path, reason):
            super().__init__(str(path))
        self.isa = isa.name
        self.unkept = reason
        """Why the next process has to build it again, if it has to."""
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self, name)
            function.restype, function.argtypes = result, arguments
        if self.tm_probe() != 0:
            raise BuildError(f"{isa.name} is announced by the CPU but doesn't work")
        self.tm_set_threads(default_threads())


_lock = threading.Lock()
_loaded: dict[str, Library] = {}
_current: Library | None = None
_tried = False


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(isa: InstructionSet) -> Library:
    """The library for one instruction set that this machine supports; raises BuildError."""
    with _lock:
        if isa.name not in _loaded:
            try:
                _loaded[isa.name] = Library(isa)
            except OSError as error:
                raise BuildError(f"cannot load the built library: {str(error)[:200]}") from error
        return _loaded[isa.name]


def current() -> Library | None:
    """The best library that works here, or None (said once, in one line).

    Raises ValueError where TOKENMILL_ISA names no set of this machine.
    """
    global _current, _tried
    if _current is None and not _tried:
        candidates = to_try(supported())
        _tried = True
        reasons = []
        for isa in candidates:
            try:
                _current = load(isa)
                break
            except BuildError as error:
                reasons.append(f"{isa.name}: {error}")
        if _current is None:
            log.warning("CPU kernels unavailable, using plain torch (%s)", "; ".join(dict.fromkeys(reasons)))
        elif reasons:
            log.warning("CPU kernels for %s (%s)", _current.isa, "; ".join(reasons))
        if _current is not None and _current.unkept is not None:
            log.warning(
                "%s, so each start compiles the CPU kernels again; set TOKENMILL_CACHE to a folder with room",
                _current.unkept,
            )
    return _current


def required() -> Library:
    """As `current()`, for callers that checked it before; raises RuntimeError."""
    library = _current or current()
    if library is None:
        raise RuntimeError("the CPU kernels are unavailable here")
    return library


@contextmanager
def using(isa: InstructionSet) -> Iterator[Library]:
    """Run with another instruction set's library; for tests and measurements."""
    global _current
    before, _current = _current, load(isa)
    try:
        yield _current
    finally:
        _current = before


def set_threads(count: int) -> None:
    """How many threads a kernel may use, the caller's included."""
    if count < 1:
        raise ValueError(f"threads must be at least 1, not {count}")
    required().tm_set_threads(count)


def type_of(tensor: Tensor) -> int:
    """The number of a tensor's element type; raises ValueError for types that the kernels don't take."""
    try:
        return TYPES[tensor.dtype]
    except KeyError:
        raise ValueError(f"the CPU kernels take bfloat16 and float32, not {tensor.dtype}") from None


def check(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, if it is a dense CPU one of this shape and type; raises ValueError otherwise."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name} must be a contiguous CPU tensor")
    return tensor


__all__ = [
    "ACTIVATIONS",
    "TYPES",
    "Library",
    "check",
    "current",
    "default_threads",
    "load",
    "required",
    "set_threads",
    "type_of",
    "using",
]

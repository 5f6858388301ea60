"""Layers that carry a state on the CPU: twins of `kernels/recurrent.py`.

Convolutions, rules and norms are brought into the kernels' form once; each is then called, or recorded (`tape.py`).
States are written in place. Everything is computed in float32.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import ACTIVATIONS, check, required, type_of
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rows, Rule

MAX_TAPS = 8


class ConvStruct(ctypes.Structure):
    """`Conv` of src/recurrent.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("channels", "taps", "width")),
        ("activation", c_int32),
        ("gated", c_int32),
    )


class RecurrenceStruct(ctypes.Structure):
    """`Recurrence` of src/recurrent.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("rate", "step_bias", "skip")),
        *((name, c_int64) for name in ("key_heads", "heads", "key_size", "value_size")),
        ("strength", c_float),
        ("least", c_float),
        ("delta", c_int32),
    )


class GatedNormStruct(ctypes.Structure):
    """`GatedNorm` of src/recurrent.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("weights", c_int64),
        ("size", c_int64),
        ("eps", c_float),
        ("gate_first", c_int32),
    )


class SequencesStruct(ctypes.Structure):
    """`Sequences` of src/recurrent.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("lines", "seq_lens", "query_start")),
        ("count", c_int64),
    )


class PackedConv:
    """`recurrent.causal_conv` of one layer. Raises ValueError for more than 8 taps, or none to carry on."""

    def __init__(self, conv: Conv) -> None:
        self.channels, self.taps = conv.weight.shape
        if not 2 <= self.taps <= MAX_TAPS:
            raise ValueError(f"a convolution has 2 to {MAX_TAPS} taps, not {self.taps}")
        self._weight = conv.weight.float().T.contiguous()
        self._bias = None if conv.bias is None else conv.bias.float().contiguous()
        self._activation = ACTIVATIONS[conv.activation]
        self.gated = conv.gated
        self._structs: dict[int, ConvStruct] = {}

    def struct(self, width: int) -> ConvStruct:
        """For rows of `width` elements."""
        if width < self.channels * (3 if self.gated else 1):
            raise ValueError(f"rows of {width} don't hold {self.channels} channels")
        if width not in self._structs:
            self._structs[width] = ConvStruct(
                weight=self._weight.data_ptr(),
                bias=None if self._bias is None else self._bias.data_ptr(),
                channels=self.channels,
                taps=self.taps,
                width=width,
                activation=self._activation,
                gated=self.gated,
            )
        return self._structs[width]

    def check_state(self, state: Tensor, dtype: torch.dtype) -> None:
        check(state, "state", (state.shape[0], self.taps - 1, self.channels), dtype)

    def __call__(self, x: Tensor, state: Tensor, rows: Rows) -> Tensor:
        check(x, "x", tuple(x.shape))
        self.check_state(state, x.dtype)
        out = torch.empty(x.shape[0], self.channels, dtype=x.dtype)
        job, whose = self.struct(x.shape[1]), _sequences(rows, len(state))
        required().tm_causal_conv(
            *(ctypes.byref(job), ctypes.byref(whose), x.data_ptr(), state.data_ptr(), out.data_ptr()),
            type_of(x),
        )
        return out


class PackedRule:
    """`recurrent.recur` of one layer."""

    def __init__(self, rule: Rule) -> None:
        self.width = rule.width
        self.gates = rule.heads * (2 if rule.delta else 1)
        self.out_features = rule.heads * rule.value_size
        self._sizes = (rule.heads, rule.key_size, rule.value_size)
        self._held = [
            None if each is None else each.float().contiguous()
            for each in (rule.rate, rule.step_bias, rule.skip)
        ]
        rate, step_bias, skip = (None if each is None else each.data_ptr() for each in self._held)
        self.struct = RecurrenceStruct(
            rate=rate,
            step_bias=step_bias,
            skip=skip,
            key_heads=rule.key_heads,
            heads=rule.heads,
            key_size=rule.key_size,
            value_size=rule.value_size,
            strength=rule.strength,
            least=rule.least,
            delta=rule.delta,
        )

    def check_state(self, state: Tensor) -> None:
        check(state, "state", (state.shape[0], *self._sizes), torch.float32)

    def __call__(self, x: Tensor, gates: Tensor, state: Tensor, rows: Rows) -> Tensor:
        check(x, "x", (x.shape[0], self.width))
        check(gates, "gates", (x.shape[0], self.gates), torch.float32)
        self.check_state(state)
        out = torch.empty(x.shape[0], self.out_features, dtype=x.dtype)
        whose = _sequences(rows, len(state))
        required().tm_recur(
            *(ctypes.byref(self.struct), ctypes.byref(whose), x.data_ptr(), gates.data_ptr()),
            *(state.data_ptr(), out.data_ptr(), type_of(x)),
        )
        return out


class PackedNorm:
    """`recurrent.gated_norm` of one layer."""

    def __init__(self, norm: GatedNorm) -> None:
        self._weight = norm.weight.float().contiguous()
        self.size = norm.size
        self.struct = GatedNormStruct(
            weight=self._weight.data_ptr(),
            weights=self._weight.numel(),
            size=norm.size,
            eps=norm.eps,
            gate_first=norm.gate_first,
        )

    def check_width(self, width: int, gate_width: int) -> None:
        """Raise ValueError unless rows of `width` are whole parts, and the gate's hold as much."""
        if width % self.size or self._weight.numel() not in (self.size, width) or gate_width < width:
            raise ValueError(f"rows of {width} under {gate_width} aren't parts of {self.size}")

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        check(x, "x", tuple(x.shape))
        check(gate, "gate", (x.shape[0], gate.shape[1]), x.dtype)
        self.check_width(x.shape[1], gate.shape[1])
        out = torch.empty_like(x)
        required().tm_gated_norm(
            *(ctypes.byref(self.struct), x.data_ptr(), gate.data_ptr(), out.data_ptr()),
            *(*x.shape, gate.shape[1], type_of(x)),
        )
        return out


def gate_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), both of one shape and type."""
    check(x, "x", tuple(x.shape))
    check(gate, "gate", tuple(x.shape), x.dtype)
    out = torch.empty_like(x)
    required().tm_gate_mul(x.data_ptr(), gate.data_ptr(), out.data_ptr(), x.numel(), type_of(x))
    return out


def _sequences(rows: Rows, states: int) -> Any:
    lines, seq_lens, query_start = rows
    check(lines, "lines", (len(seq_lens),), torch.int64)
    check(seq_lens, "seq_lens", (len(seq_lens),), torch.int32)
    check(query_start, "query_start", (len(seq_lens) + 1,), torch.int32)
    if len(lines) and not 0 <= int(lines.min()) <= int(lines.max()) < states:
        raise ValueError(f"lines must be of {states} states")
    return SequencesStruct(lines.data_ptr(), seq_lens.data_ptr(), query_start.data_ptr(), len(seq_lens))

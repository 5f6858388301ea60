"""The fused decoder on a CPU as one call a step: a tape, recorded by running the decoder once on stand-ins.

    Decoder(stand-ins) ──▶ kernels given a stand-in record instead of computing ──▶ Tape (kernels/cpu/tape.py)

So decoder.py stays the one place that says what a decoder does, and a step costs one call into C++ instead of
some eight a layer. What can't be recorded makes `record` return None, and the decoder runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from tokenmill.engine.attention import AttentionMetadata
from tokenmill.engine.cpu_kernels import CpuKernels
from tokenmill.engine.cpu_products import CpuProduct
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.kernel_set import Convolve, GatedNormalize, Lookup, Mixture, Recur, Router
from tokenmill.kernels.cpu import elementwise, recurrent, tape
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.cpu.mixture import Chooser, PackedMixture
from tokenmill.kernels.cpu.recurrent import PackedConv, PackedNorm, PackedRule
from tokenmill.kernels.reference import Routing


class CantBeRecorded(TypeError):
    """The decoder did something with a stand-in that no tape can repeat."""


class Traced:
    """Stands for a tensor [rows, width] while the decoder is recorded.

    After the head the decoder may still scale and bend the logits in place: that is kept as Python to run after
    the tape (`after`), on the few rows that there are.
    """

    def __init__(self, recorder: tape.Tape, value: tape.Value) -> None:
        self.tape = recorder
        self.value = value
        self.after: list[Callable[[Tensor], Tensor]] = []

    def on(self, value: tape.Value) -> Traced:
        return Traced(self.tape, value)

    def flatten(self, _: int) -> Traced:
        return self

    def __getitem__(self, index: object) -> Traced:
        if index is not LOGITS_INDEX:
            raise CantBeRecorded(f"rows {index!r}")
        return self.on(self.tape.pick(self.value))

    def __mul__(self, scale: object) -> Traced:
        if not isinstance(scale, float):
            raise CantBeRecorded("a product of values")
        return self.on(self.tape.scale_add(self.value, scale))

    def __add__(self, other: object) -> Traced:
        if not isinstance(other, Traced):
            raise CantBeRecorded("a sum with a tensor")
        return self.on(self.tape.scale_add(other.value, 1.0, self.value))

    def mul_(self, scale: float) -> Traced:
        self.after.append(lambda logits: logits.mul_(scale))
        return self

    def div_(self, divisor: float) -> Traced:
        self.after.append(lambda logits: logits.div_(divisor))
        return self

    def tanh_(self) -> Traced:
        self.after.append(lambda logits: logits.tanh_())
        return self


LOGITS_INDEX = object()
EVERY_POSITION = slice(None)
"""Indexes the rotary tables while recording: the tape reads them at the step's own positions."""


class TracingKernels(CpuKernels):
    """CpuKernels that record when they are given a stand-in."""

    def _finish(self, product: CpuProduct) -> CpuProduct:
        product = super()._finish(product)
        return _TracedProduct(product.parts, product.gate)

    def _look_up(self, table: Tensor | PackedLinear, dtype: torch.dtype) -> Lookup:
        plain = super()._look_up(table, dtype)

        def look_up(ids: Any) -> Any:
            if isinstance(ids, tape.Tape):
                return Traced(ids, ids.gather(table) if isinstance(table, Tensor) else ids.rows(table))
            return plain(ids)

        return look_up

    @staticmethod
    def rms_norm(x: Any, weight: Tensor, eps: float, offset: float = 0.0) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.rms_norm(x.value, weight, eps, offset))
        return elementwise.rms_norm(x, weight, eps, offset)

    @staticmethod
    def norm_add(x: Any, weight: Tensor, eps: float, offset: float, residual: Any, scale: float = 1.0) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.norm_add(x.value, weight, eps, offset, residual.value, scale))
        return elementwise.norm_add(x, weight, eps, offset, residual, scale)

    @staticmethod
    def layer_norm(x: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.layer_norm(x.value, weight, bias, eps))
        return elementwise.layer_norm(x, weight, bias, eps)

    @staticmethod
    def activate(x: Any, activation: str) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.activate(x.value, activation))
        return elementwise.activate(x, activation)

    @staticmethod
    def act_mul(x: Any, other: Any, start: int, activation: str) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.act_mul(x.value, other.value, start, activation))
        return elementwise.act_mul(x, other, start, activation)

    def norm_whole(self, qkv: Any, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float) -> Any:
        if isinstance(qkv, Traced):
            return qkv.on(qkv.tape.norm_whole(qkv.value, q_weight, k_weight, eps, offset))
        return elementwise.norm_whole(qkv, q_weight, k_weight, eps, offset)

    @staticmethod
    def gate_add(x: Any, gate: Any, residual: Any = None) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.gate_add(x.value, gate.value, None if residual is None else residual.value))
        return elementwise.gate_add(x, gate, residual)

    def _router(self, packed: PackedLinear) -> Router:
        plain = super()._router(packed)

        def router(x: Any) -> Any:
            if isinstance(x, Traced):
                return x.on(x.tape.linear(packed, x.value, wide=True))
            return plain(x)

        return router

    @staticmethod
    def route(logits: Any, routing: Routing, slots: Any = None) -> Any:
        """Of a stand-in, what the mixture will be recorded with: its experts are chosen where they are mixed."""
        if isinstance(logits, Traced):
            return logits.value, Chooser(routing, logits.value.width)
        return CpuKernels.route(logits, routing, slots)

    def _mixture(self, packed: PackedMixture) -> Mixture:
        def mix(x: Any, ids: Any, weights: Any, residual: Any) -> Any:
            if isinstance(x, Traced):
                added = None if residual is None else residual.value
                return x.on(x.tape.mixture(packed, weights, x.value, ids, added))
            return packed(x, ids, weights, residual)

        return mix

    def _convolve(self, packed: PackedConv) -> Convolve:
        def convolve(x: Any, state: Tensor, rows: Any) -> Any:
            if isinstance(x, Traced):
                return x.on(x.tape.conv(packed, x.value, state))
            return packed(x, state, rows)

        return convolve

    def _recur(self, packed: PackedRule) -> Recur:
        def recur(x: Any, gates: Any, state: Tensor, rows: Any) -> Any:
            if isinstance(x, Traced):
                return x.on(x.tape.recur(packed, x.value, gates.value, state))
            return packed(x, gates, state, rows)

        return recur

    def _gated_normalize(self, packed: PackedNorm) -> GatedNormalize:
        def normalize(x: Any, gate: Any) -> Any:
            if isinstance(x, Traced):
                return x.on(x.tape.gated_norm(packed, x.value, gate.value))
            return packed(x, gate)

        return normalize

    @staticmethod
    def gate_mul(x: Any, gate: Any) -> Any:
        if isinstance(x, Traced):
            return x.on(x.tape.gate_mul(x.value, gate.value))
        return recurrent.gate_mul(x, gate)

    @staticmethod
    def rope_store(
        qkv: Any,
        cos: Tensor | None,
        sin: Tensor | None,
        slots: Any,
        k_cache: Tensor,
        v_cache: Tensor,
        **options: Any,
    ) -> Any:
        if isinstance(qkv, Traced):
            return qkv.on(qkv.tape.rope_store(qkv.value, cos, sin, k_cache, v_cache, **options))
        return elementwise.rope_store(qkv, cos, sin, slots, k_cache, v_cache, **options)


class _TracedProduct(CpuProduct):
    """A product that can be recorded."""

    def __call__(self, x: Any, residual: Any = None, out: Tensor | None = None) -> Any:
        if not isinstance(x, Traced):
            return super().__call__(x, residual, out)
        added = residual.value if isinstance(residual, Traced) else None
        if self.packed is not None:
            return x.on(x.tape.linear(self.packed, x.value, added))
        first, *others = (x.tape.linear(part, x.value) for part in self.parts)
        for other in others:
            first = x.tape.join(first, other)
        if self.gate is not None:
            first = x.tape.activation_mul(first, self.gate)
        return x.on(first if added is None else x.tape.scale_add(first, 1.0, added))


class TapedDecoder:
    """A recorded decoder; called as the decoder is."""

    def __init__(self, recorded: tape.Tape, after: list[Callable[[Tensor], Tensor]]) -> None:
        self._tape = recorded
        self._after = after

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
        logits_index: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V] of tokens [T] at `positions` [T], at rows `logits_index` [N] or all."""
        if logits_index is None:
            logits_index = torch.arange(len(input_ids))
        lengths = (metadata.block_table, metadata.seq_lens, metadata.query_start)
        alone = metadata.alone(logits_index, positions) if self._tape.narrows else None
        logits = self._tape.run(
            *(input_ids, positions, metadata.slots, *lengths, logits_index, metadata.lines, alone)
        )
        for change in self._after:
            logits = change(logits)
        return logits if out is None else out.copy_(logits)


def record(decoder: Decoder, caches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> TapedDecoder | None:
    """The decoder as a tape over these caches; None where it does what no tape can."""
    recorder = tape.Tape(dtype)

    def look_up(layer: int, query: Traced, **options: Any) -> Traced:
        return query.on(recorder.attend(query.value, *caches[layer], **options))

    metadata = SimpleNamespace(caches=caches, slots=None, rows=None, look_up=look_up)
    metadata.narrowed = lambda _, positions: (metadata, positions)
    try:
        logits = cast(Any, decoder)(recorder, EVERY_POSITION, metadata, LOGITS_INDEX)
        recorder.seal(logits.value)
    except (CantBeRecorded, TypeError, AttributeError, ValueError):
        return None
    return TapedDecoder(recorder, logits.after)

"""The C++ kernels as a kernel set. A step of the fused decoder plays them from a tape (`cpu_tape.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenmill.engine import cpu_products
from tokenmill.engine.block_weight import Experts, Weight
from tokenmill.engine.config import Quantization
from tokenmill.engine.cpu_products import CpuProduct
from tokenmill.engine.kernel_set import (
    Adjustments,
    Convolve,
    GatedNormalize,
    Lookup,
    Mixture,
    Product,
    Recur,
    ReferenceKernels,
    Router,
    Settings,
)
from tokenmill.kernels.cpu import attention, elementwise, mixture, recurrent, sampling
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.cpu.mixture import PackedMixture
from tokenmill.kernels.cpu.recurrent import PackedConv, PackedNorm, PackedRule
from tokenmill.kernels.groups import Kind
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule
from tokenmill.kernels.reference import Routing


class CpuKernels(ReferenceKernels):
    """The C++ kernels, for bfloat16 and float32."""

    name = "cpu"
    quantizations = frozenset({"int8", "int4", "gguf"})
    packings: frozenset[Kind] = frozenset({"int4", "fp4", "int8"})

    rope_store = staticmethod(elementwise.rope_store)
    rms_norm = staticmethod(elementwise.rms_norm)
    norm_add = staticmethod(elementwise.norm_add)
    layer_norm = staticmethod(elementwise.layer_norm)
    activate = staticmethod(elementwise.activate)
    act_mul = staticmethod(elementwise.act_mul)
    gate_add = staticmethod(elementwise.gate_add)
    gate_mul = staticmethod(recurrent.gate_mul)
    apply_penalties = staticmethod(sampling.apply_penalties)
    apply_bitmask = staticmethod(sampling.apply_bitmask)
    sample = staticmethod(sampling.sample)
    token_logprobs = staticmethod(sampling.token_logprobs)

    def __init__(self, quantization: Quantization | None = None) -> None:
        self.quantization = quantization
        self.store_kv = self._store
        self.paged_attention = self._attend

    def _store(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        dtype = k_cache.dtype
        attention.store_kv(
            key.to(dtype).contiguous(), value.to(dtype).contiguous(), k_cache, v_cache, slots.contiguous()
        )

    def _attend(self, query: Tensor, *args: Any, **options: Any) -> Tensor:
        return attention.paged_attention(query.contiguous(), *args, **options)

    def block_size(self, dtype: torch.dtype) -> int:
        """The matrix unit takes values of 32 tokens at once, which have to lie in one block (src/cache_layout.h)."""
        return 32 if dtype is torch.bfloat16 else 16

    def adjust(self, logits: Tensor, changes: Adjustments) -> Tensor:
        """As the base's; logits that nothing changes are drawn from in the type that they have."""
        return super().adjust(logits, changes) if changes else logits

    def _drawn(self, logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        tokens, flags = sampling.draw(logits, *settings)
        return tokens, flags

    def own_threads(self) -> None:
        """torch's small operations run in the calling thread: a second pool of spinning threads costs more."""
        torch.set_num_threads(1)

    def norm_whole(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        return elementwise.norm_whole(qkv, q_weight, k_weight, eps, offset)

    def make_linear(
        self, weights: Sequence[Weight], biases: Sequence[Tensor | None], gate: str | None
    ) -> Product:
        return self._finish(cpu_products.pack(weights, biases, gate, self.quantization))

    def make_exact(self, weight: Weight, bias: Tensor | None) -> Product:
        return self._finish(cpu_products.pack([weight], [bias], None, None))

    def make_head(self, weight: Weight, bias: Tensor | None) -> Product:
        return self._finish(cpu_products.pack_head(weight, bias, self.quantization))

    def _finish(self, product: CpuProduct) -> CpuProduct:
        """The product as these kernels give it away."""
        self.saved_bytes += sum(part.saved_bytes for part in product.parts)
        return product

    def make_router(self, weight: Weight, bias: Tensor | None) -> Router:
        product = self._finish(cpu_products.pack([weight], [bias], None, None))
        assert product.packed is not None
        return self._router(product.packed)

    def _router(self, packed: PackedLinear) -> Router:
        return lambda x: packed(x, out=torch.empty(x.shape[0], packed.out_features))

    @staticmethod
    def route(logits: Tensor, routing: Routing, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return mixture.Chooser(routing, logits.shape[1])(logits, slots)

    def make_mixture(
        self,
        gate_up: Experts,
        down: Experts,
        activation: str,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Mixture:
        ups = cpu_products.pack_experts(gate_up, gate_up_bias, activation, self.quantization)
        downs = cpu_products.pack_experts(down, down_bias, None, self.quantization)
        self.saved_expert_bytes += sum(part.saved_bytes for part in (*ups, *downs))
        return self._mixture(PackedMixture(ups, downs))

    def _mixture(self, packed: PackedMixture) -> Mixture:
        return packed

    @staticmethod
    def copy_states(state: Tensor, source: Tensor, target: Tensor) -> None:
        """Whole rows of memory, which indexing would move element by element."""
        for line, other in zip(source.tolist(), target.tolist(), strict=True):
            state[other].copy_(state[line])

    def make_conv(self, conv: Conv) -> Convolve:
        return self._convolve(PackedConv(conv))

    def make_recurrence(self, rule: Rule) -> Recur:
        return self._recur(PackedRule(rule))

    def make_gated_norm(self, norm: GatedNorm) -> GatedNormalize:
        return self._gated_normalize(PackedNorm(norm))

    def _convolve(self, packed: PackedConv) -> Convolve:
        return packed

    def _recur(self, packed: PackedRule) -> Recur:
        return packed

    def _gated_normalize(self, packed: PackedNorm) -> GatedNormalize:
        return packed

    def make_embedding(self, weight: Weight, head: Product | None) -> Lookup:
        return self._look_up(cpu_products.table_of(weight, head), weight.dtype)

    def _look_up(self, table: Tensor | PackedLinear, dtype: torch.dtype) -> Lookup:
        if isinstance(table, Tensor):
            return super().make_embedding(table, None)
        return lambda ids: table.rows(ids, dtype)

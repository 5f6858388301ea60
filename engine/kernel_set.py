"""Which kernels a device gets: one object with the functions of `kernels/reference.py`, and its own products.

    cuda   Triton (kernels/gpu; engine/gpu_kernels.py)
    cpu    C++ (kernels/cpu) for what it has and the dtype takes; plain torch where no library can be built

TOKENMILL_KERNELS=torch, cpu or triton in the environment overrides the choice: to look for a fault, or to run the
Triton kernels in their interpreter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenmill.engine.block_weight import Weight, join, join_biases
from tokenmill.engine.config import EngineConfig, Quantization
from tokenmill.engine.load_error import LoadError
from tokenmill.kernels import gpu, reference

if TYPE_CHECKING:
    from tokenmill.engine.cpu_products import CpuProduct
    from tokenmill.kernels.cpu.linear import PackedLinear

logger = logging.getLogger("tokenmill.engine")
Normalize = Callable[[Tensor], Tensor]
"""x [T, hidden] → what the products that follow take."""
Lookup = Callable[[Tensor], Tensor]
"""ids [T] int64 → rows [T, hidden] of the embedding."""
Mixture = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x [T, in], expert ids [T, k] int32 (-1: none), weights [T, k] float32, residual [T, out] or None → [T, out]."""
Entries = tuple[Tensor, Tensor, Tensor]
"""Rows, tokens (int64, distinct pairs) and float32 values to add there."""
Settings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""[N] each: temperature, min_p, top_k, top_p, seeds, positions, as `reference.sample` takes them."""


class Product(Protocol):
    """x [T, in], residual [T, out] or None → x @ weight.T (+ bias) (+ residual): [T, out], in `out` if given."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...


class AttentionPlans(Protocol):
    """What a step's attention layers share."""

    def attend(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: tuple[Tensor, Tensor, Tensor],
        **options: Any,
    ) -> Tensor:
        """`reference.paged_attention`; `lengths` are the step's block table, sequence lengths, query starts."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """The arguments of `reference.apply_penalties` after the logits."""

    lines: Tensor
    counts: Tensor
    seen: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.lines, self.counts, self.seen, self.repetition, self.presence, self.frequency


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What happens to logits before a draw, in this order; `penalties` are over lines of counts of their own."""

    bias: Entries | None = None
    penalties: tuple[Penalties, ...] = ()
    mask: tuple[Tensor, Tensor] | None = None
    """Rows [n] int64 and, [n, words] int32, the tokens that their grammars allow."""

    def __bool__(self) -> bool:
        return self.bias is not None or bool(self.penalties) or self.mask is not None


class ReferenceKernels:
    """Plain torch on any device; the base of the faster sets, which replace what they do better."""

    name = "torch"
    captures = False
    """Whether a decode step on these kernels can be captured in a CUDA graph."""
    quantizations: frozenset[Quantization] = frozenset()
    """The formats in which products can hold their weights, beside the one that these come in."""
    fp8_cache = False
    """Whether the paged cache may be held in 8-bit floats."""

    store_kv: Callable[..., None] = staticmethod(reference.store_kv)
    paged_attention: Callable[..., Tensor] = staticmethod(reference.paged_attention)
    copy_blocks: Callable[..., None] = staticmethod(reference.copy_blocks)
    rope_store: Callable[..., Tensor] = staticmethod(reference.rope_store)
    rms_norm: Callable[..., Tensor] = staticmethod(reference.rms_norm)
    layer_norm: Callable[..., Tensor] = staticmethod(reference.layer_norm)
    activate: Callable[..., Tensor] = staticmethod(reference.activate)
    apply_logit_bias: Callable[..., None] = staticmethod(reference.apply_logit_bias)
    apply_penalties: Callable[..., None] = staticmethod(reference.apply_penalties)
    apply_bitmask: Callable[..., None] = staticmethod(reference.apply_bitmask)
    sample: Callable[..., Tensor] = staticmethod(reference.sample)
    token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(reference.token_logprobs)
    route: Callable[..., tuple[Tensor, Tensor]] = staticmethod(reference.route)

    def block_size(self, dtype: torch.dtype) -> int:
        """Tokens a block of a cache of `dtype` where nothing else is asked for."""
        return 16

    def reserve(self, rows: int, width: int) -> None:
        """Make what steps of at most `rows` rows of `width` logits need, so that none allocates later."""

    def overlapping(self) -> AbstractContextManager[None]:
        """Inside it a step's kernels may begin before the last ones have ended; for steps that are captured."""
        return nullcontext()

    def plan_attention(self, decodes: int) -> AttentionPlans | None:
        """What a step's layers share; its first `decodes` rows have one token each."""
        return None

    def make_norm(self, weight: Tensor, eps: float, offset: float, into: Sequence[object]) -> Normalize:
        """An RMS norm whose result goes into the products `into` and nowhere else (none: anywhere)."""
        return lambda x: self.rms_norm(x, weight, eps, offset)

    def make_linear(
        self, weights: Sequence[Weight], biases: Sequence[Tensor | None], gate: str | None
    ) -> Product:
        """One product over the rows of all `weights`; `gate`: they are gate and up rows, act(gate) * up results."""
        weight, bias = join(weights), join_biases(weights, biases)

        def product(x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
            if gate is None:
                result = reference.linear(x, weight, bias, residual)
            else:
                result = reference.activation_mul(reference.linear(x, weight, bias), gate)
                result = result if residual is None else residual + result
            return result if out is None else out.copy_(result)

        return product

    def make_exact(self, weight: Weight, bias: Tensor | None) -> Product:
        """A product whose weight stays as it is where others are quantized: a router."""
        return self.make_linear([weight], [bias], None)

    def make_head(self, weight: Weight, bias: Tensor | None) -> Product:
        """The product that brings logits."""
        return self.make_exact(weight, bias)

    def make_mixture(self, gate_up: Tensor, down: Tensor, activation: str) -> Mixture:
        """The experts of a layer: `gate_up` [X, 2 * I, in] with the gate first, `down` [X, out, I]."""
        return lambda x, ids, weights, residual: reference.mixture(
            x, ids, weights, gate_up, down, activation, residual=residual
        )

    def own_threads(self) -> None:
        """A whole forward pass runs on these kernels now: libraries that would compete with their threads yield."""

    def make_embedding(self, weight: Weight, head: Product | None) -> Lookup:
        """Look-up of rows; `head` is the product over the same weight where the two are tied."""
        table = join([weight])
        return lambda ids: table[ids]

    def adjust(self, logits: Tensor, changes: Adjustments) -> Tensor:
        """Float32 logits [N, V] after `changes`; those given stay as they are."""
        work = logits.clone() if changes and logits.dtype is torch.float32 else logits.float()
        if changes.bias is not None:
            self.apply_logit_bias(work, *changes.bias)
        for penalties in changes.penalties:
            self.apply_penalties(work, *penalties.arguments)
        if changes.mask is not None:
            self.apply_bitmask(work, *changes.mask)
        return work

    def draw(
        self,
        logits: Tensor,
        settings: Settings,
        *,
        filtered: bool = True,
        counted: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Token ids [N] int64 and flags [N]: not 0 where a row has no finite largest logit.

        `filtered` False says that no row uses min_p, top_k or top_p. `counted` are lines [N] int64 (-1: none) of
        counts [M, V] int32 in which each token is counted.
        """
        tokens, flags = self._drawn(logits, settings)
        if counted is not None:
            lines, counts = counted
            rows = (lines >= 0).nonzero().flatten()
            counts[lines[rows], tokens[rows]] += 1
        return tokens if out is None else out.copy_(tokens), flags

    def _drawn(self, logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        flags = ~torch.isfinite(logits.amax(-1)) if len(logits) else torch.zeros(0, dtype=torch.bool)
        return self.sample(logits, *settings), flags


class CpuKernels(ReferenceKernels):
    """The C++ kernels, for bfloat16 and float32."""

    name = "cpu"
    quantizations = frozenset({"int8", "int4", "gguf"})

    def __init__(self, quantization: Quantization | None = None) -> None:
        from tokenmill.engine import cpu_products
        from tokenmill.kernels.cpu import attention, elementwise, sampling

        self.quantization = quantization
        self._attention, self._sampling, self._products = attention, sampling, cpu_products
        for module in (elementwise, sampling):
            for function in (
                "rope_store",
                "rms_norm",
                "layer_norm",
                "activate",
                "apply_penalties",
                "apply_bitmask",
            ):
                if hasattr(module, function):
                    setattr(self, function, getattr(module, function))
        self.sample = sampling.sample
        self.token_logprobs = sampling.token_logprobs
        self.store_kv = self._store
        self.paged_attention = self._attend

    def _store(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        dtype = k_cache.dtype
        self._attention.store_kv(
            key.to(dtype).contiguous(), value.to(dtype).contiguous(), k_cache, v_cache, slots.contiguous()
        )

    def _attend(self, query: Tensor, *args: Any, **options: Any) -> Tensor:
        return self._attention.paged_attention(query.contiguous(), *args, **options)

    def block_size(self, dtype: torch.dtype) -> int:
        """The matrix unit takes values of 32 tokens at once, which have to lie in one block (src/cache_layout.h)."""
        return 32 if dtype is torch.bfloat16 else 16

    def adjust(self, logits: Tensor, changes: Adjustments) -> Tensor:
        """As the base's; logits that nothing changes are drawn from in the type that they have."""
        return super().adjust(logits, changes) if changes else logits

    def _drawn(self, logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        tokens, flags = self._sampling.draw(logits, *settings)
        return tokens, flags

    def own_threads(self) -> None:
        """torch's small operations run in the calling thread: a second pool of spinning threads costs more."""
        torch.set_num_threads(1)

    def make_linear(
        self, weights: Sequence[Weight], biases: Sequence[Tensor | None], gate: str | None
    ) -> Product:
        return self._finish(self._products.pack(weights, biases, gate, self.quantization))

    def make_exact(self, weight: Weight, bias: Tensor | None) -> Product:
        return self._finish(self._products.pack([weight], [bias], None, None))

    def make_head(self, weight: Weight, bias: Tensor | None) -> Product:
        return self._finish(self._products.pack_head(weight, bias, self.quantization))

    def _finish(self, product: CpuProduct) -> CpuProduct:
        """The product as these kernels give it away."""
        return product

    def make_mixture(self, gate_up: Tensor, down: Tensor, activation: str) -> Mixture:
        """Each expert is two packed products, so a token's result doesn't depend on who shares its experts."""
        ups = [self._products.pack([w], [None], activation, self.quantization) for w in gate_up]
        downs = [self._products.pack([w], [None], None, self.quantization) for w in down]

        def mix(x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
            return reference.mix_by_expert(
                x, ids, weights, lambda expert, rows: downs[expert](ups[expert](rows)), residual
            )

        return mix

    def make_embedding(self, weight: Weight, head: Product | None) -> Lookup:
        return self._look_up(self._products.table_of(weight, head), weight.dtype)

    def _look_up(self, table: Tensor | PackedLinear, dtype: torch.dtype) -> Lookup:
        if isinstance(table, Tensor):
            return super().make_embedding(table, None)
        return lambda ids: table.rows(ids, dtype)


def _why_no_triton() -> str | None:
    """Why the Triton kernels can't run here, in one line; None if they can."""
    if not gpu.available():
        return "the GPU kernels need Triton: pip install 'tokenmill[gpu]'"
    reason: str | None = gpu.check_toolchain()
    return reason


def select_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    quantization: Quantization | None = None,
) -> ReferenceKernels:
    """The fastest kernels that work on `device` with `dtype`.

    `deterministic`: every result stays the same to the bit in any batch, where that costs speed too.
    `quantization` of the weights reaches those kernels alone that say `quantizes`.
    """
    wanted = os.environ.get("TOKENMILL_KERNELS", "triton" if device.type == "cuda" else "cpu")
    if wanted == "triton":
        reason = _why_no_triton()
        if reason is None:
            from tokenmill.engine.gpu_kernels import GpuKernels

            return GpuKernels(device, dtype, deterministic=deterministic, quantization=quantization)
        logger.warning("%s; plain torch runs instead, slowly", reason)
    elif wanted == "cpu" and device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        from tokenmill.kernels.cpu.library import current

        if current() is not None:
            from tokenmill.engine.cpu_tape import TracingKernels

            return TracingKernels(quantization)
    return ReferenceKernels()


def configured_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> ReferenceKernels:
    """The kernels for `config`, with the threads that it gives them; raises LoadError where they can't do it."""
    if config.threads is not None:
        use_threads(config.threads)
    kernels = select_kernels(
        device, dtype, deterministic=config.deterministic is True, quantization=config.quantization
    )
    if config.quantization is not None and config.quantization not in kernels.quantizations:
        raise LoadError(
            f"{config.source}: the {kernels.name} kernels, which run here, have no quantization "
            f"{config.quantization}; leave it out"
        )
    return kernels


def use_threads(count: int) -> None:
    """Give the forward pass on a CPU `count` threads: torch's and, where they can be built, our kernels'."""
    from tokenmill.kernels.cpu import library

    torch.set_num_threads(count)
    if library.current() is not None:
        library.set_threads(count)

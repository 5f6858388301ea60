"""A set of kernels: one object with the functions of `kernels/reference.py`, and its own products.

Here is the set in plain torch. `cpu_kernels.py` and `gpu_kernels.py` replace what they do faster, `kernel_choice.py`
says which set a device gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.engine.block_weight import Experts, Weight, full, join, join_biases
from tokenmill.engine.config import Quantization
from tokenmill.kernels import recurrent, reference
from tokenmill.kernels.groups import Kind
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rows, Rule

Normalize = Callable[[Tensor], Tensor]
"""x [T, hidden] → what the products that follow take."""
NormAdd = Callable[[Tensor, Tensor], Tensor]
"""x, residual [T, hidden] → (residual + norm of x) * a scale."""
Lookup = Callable[[Tensor], Tensor]
"""ids [T] int64 → rows [T, hidden] of the embedding."""
Router = Callable[[Tensor], Tensor]
"""x [T, in] → [T, X] float32."""
Mixture = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x [T, in], expert ids [T, k] int32 (-1: none), weights [T, k] float32, residual [T, out] or None → [T, out]."""
Convolve = Callable[[Tensor, Tensor, Rows], Tensor]
"""x [T, W], the layer's state, whose it is → [T, C]: `recurrent.causal_conv`."""
Recur = Callable[[Tensor, Tensor, Tensor, Rows], Tensor]
"""x [T, W], gates [T, ·], the layer's state, whose it is → [T, H * E]: `recurrent.recur`."""
GatedNormalize = Callable[[Tensor, Tensor], Tensor]
"""x [T, W], what gates it in its last columns → [T, W]: `recurrent.gated_norm`."""
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

    def of_decodes(self, count: int) -> AttentionPlans:
        """What the layers of another step share, of `count` sequences with one token each."""


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
    packings: frozenset[Kind] = frozenset()
    """The kinds of weights that products can read as a checkpoint packs them."""
    fp8_cache = False
    """Whether the paged cache may be held in 8-bit floats."""
    saved_bytes = saved_expert_bytes = 0
    """How much less than the model's own its products' and its experts' weights take, with nothing of them lost."""

    store_kv: Callable[..., None] = staticmethod(reference.store_kv)
    paged_attention: Callable[..., Tensor] = staticmethod(reference.paged_attention)
    copy_blocks: Callable[..., None] = staticmethod(reference.copy_blocks)
    rope_store: Callable[..., Tensor] = staticmethod(reference.rope_store)
    rms_norm: Callable[..., Tensor] = staticmethod(reference.rms_norm)
    norm_add: Callable[..., Tensor] = staticmethod(reference.norm_add)
    layer_norm: Callable[..., Tensor] = staticmethod(reference.layer_norm)
    activate: Callable[..., Tensor] = staticmethod(reference.activate)
    act_mul: Callable[..., Tensor] = staticmethod(reference.act_mul)
    gate_add: Callable[..., Tensor] = staticmethod(reference.gate_add)
    gate_mul: Callable[..., Tensor] = staticmethod(recurrent.gate_mul)
    copy_states: Callable[..., None] = staticmethod(recurrent.copy_states)
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

    def compile_ahead(self, launches: Callable[[], object]) -> None:
        """Have what `launches` will launch compiled, where that takes time; kernels that it calls here don't run."""

    def plan_attention(self, decodes: int) -> AttentionPlans | None:
        """What a step's layers share; its first `decodes` rows have one token each."""
        return None

    def make_norm(self, weight: Tensor, eps: float, offset: float, into: Sequence[object]) -> Normalize:
        """An RMS norm whose result goes into the products `into` and nowhere else (none: anywhere)."""
        return lambda x: self.rms_norm(x, weight, eps, offset)

    def make_norm_add(self, weight: Tensor, eps: float, offset: float, scale: float) -> NormAdd:
        """An RMS norm behind a block, with the residual sum after it."""
        return lambda x, residual: self.norm_add(x, weight, eps, offset, residual, scale)

    def norm_whole(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        """RMS norms over all query heads and over all key heads of rows [q | k | v] (OLMo 2)."""
        query, key = q_weight.numel(), k_weight.numel()
        q, k, v = torch.split(qkv, [query, key, qkv.shape[1] - query - key], dim=-1)
        normed = (
            self.rms_norm(part.contiguous(), weight, eps, offset)
            for part, weight in ((q, q_weight), (k, k_weight))
        )
        return torch.cat([*normed, v], dim=-1)

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
        """A product whose weight stays as it is where others are quantized."""
        return self.make_linear([weight], [bias], None)

    def make_router(self, weight: Weight, bias: Tensor | None) -> Router:
        """Router logits. What they choose is all or nothing, so neither weight nor result is rounded."""
        wide, added = join([weight]).float(), None if bias is None else bias.float()
        return lambda x: functional.linear(x.float(), wide, added)

    def make_conv(self, conv: Conv) -> Convolve:
        """The convolution of a layer that carries a state."""
        return lambda x, state, rows: recurrent.causal_conv(x, conv, state, rows)

    def make_recurrence(self, rule: Rule) -> Recur:
        """The recurrence of such a layer."""
        return lambda x, gates, state, rows: recurrent.recur(x, gates, rule, state, rows)

    def make_gated_norm(self, norm: GatedNorm) -> GatedNormalize:
        """The norm of what it brings."""
        return lambda x, gate: recurrent.gated_norm(x, gate, norm)

    def make_head(self, weight: Weight, bias: Tensor | None) -> Product:
        """The product that brings logits."""
        return self.make_exact(weight, bias)

    def make_mixture(
        self,
        gate_up: Experts,
        down: Experts,
        activation: str,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Mixture:
        """The experts of a layer: `gate_up` [X, 2 * I, in] with the gate first, `down` [X, out, I], biases alike."""
        held = full(gate_up), full(down)
        mix = partial(reference.mixture, gate_up_bias=gate_up_bias, down_bias=down_bias)
        return lambda x, ids, weights, residual: mix(x, ids, weights, *held, activation, residual=residual)

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

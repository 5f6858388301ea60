"""The Triton kernels as a kernel set: their workspaces, their plans, and which product a number of rows gets.

    rows ≤ 8    our skinny product, which does the norm before it too
    rows ≤ 64   our skinny product: at the memory's speed, and the same bits in any crowd
    more        cuBLAS, which is nearer the matrix units' rate; ours for quantized weights, and with
                `deterministic`, slower, in the few rows' order of sums
                `fp8_dynamic`: one product for any number, always in the same order of sums (gpu_fp8.py)

Buffers that outlive a step (workspaces, plans) are made by `reserve` and at first use, never while serving, so
that captured graphs may keep their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.engine.block_weight import Experts, Weight, full, join, join_biases
from tokenmill.engine.config import Quantization
from tokenmill.engine.gpu_fp8 import Fp8Linear
from tokenmill.engine.group_weight import GroupExperts, joined_groups, stacked
from tokenmill.engine.kernel_set import (
    Adjustments,
    Convolve,
    GatedNormalize,
    Lookup,
    Mixture,
    Normalize,
    Product,
    Recur,
    ReferenceKernels,
    Router,
    Settings,
)
from tokenmill.engine.load_error import LoadError
from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.linear_config import linear_config
from tokenmill.kernels.gpu.quantize import stored
from tokenmill.kernels.gpu.skinny_linear import NORM_ROWS, NORM_WIDTH
from tokenmill.kernels.groups import Groups, Kind
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule

SKINNY_ROWS = 64
"""Up to here a row's product has the same bits whatever the number of rows."""
SKINNY_TILE = 32
DECODE_TILE = 16


class GpuKernels(ReferenceKernels):
    """Triton on a CUDA device, or on CPU tensors under TRITON_INTERPRET=1."""

    name = "triton"
    captures = True
    fp8_cache = True
    quantizations = frozenset({"fp8", "fp8_dynamic", "int8", "int4"})
    packings: frozenset[Kind] = frozenset({"int4", "fp4", "int8", "fp8"})

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool = False,
        quantization: Quantization | None = None,
    ) -> None:
        self.device, self.dtype, self.deterministic = device, dtype, deterministic
        self.quantization = quantization
        self.overlaps = gpu.supports_overlap(device)
        self.store_kv = gpu.store_kv
        self.copy_blocks = gpu.copy_blocks
        self.apply_logit_bias = gpu.apply_logit_bias
        self.apply_penalties = gpu.apply_penalties
        self.apply_bitmask = gpu.apply_bitmask
        self.route = gpu.route
        self.gate_mul = gpu.gate_mul
        self.copy_states = gpu.copy_states
        self.paged_attention = self._attend
        self.rms_norm = self._rms_norm
        self.norm_add = gpu.norm_add
        self.act_mul = gpu.act_mul
        self.rope_store = self._rope_store
        self.token_logprobs = self._token_logprobs
        self.linear_space: Any = gpu.make_linear_workspace(device)
        self._sampling_space: Any = None
        self._logprobs_space: Any = None
        self._adjusted: Tensor | None = None
        self._rows = 0
        self._width = 0
        self._plans: dict[tuple[int, ...], Any] = {}
        self._still: tuple[Tensor, Tensor] | None = None

    def reserve(self, rows: int, width: int) -> None:
        self._rows, self._width = rows, width
        self._sampling_space = gpu.make_sampling_workspace(rows, width, self.device)
        self._logprobs_space = gpu.make_logprobs_workspace(rows, width, self.device)
        self._adjusted = torch.empty(rows, width, dtype=torch.float32, device=self.device)
        self._plans.clear()

    def overlapping(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = gpu.overlapping_launches(self.overlaps)
        return context

    def compile_ahead(self, launches: Callable[[], object]) -> None:
        gpu.compile_ahead(launches)

    # ---------------------------------------------------------------- attention

    def plan_attention(self, decodes: int) -> StepPlans:
        return StepPlans(self, decodes)

    def _attend(self, query: Tensor, *args: Any, **options: Any) -> Tensor:
        out: Tensor = gpu.paged_attention(_rowwise(query), *args, **options)
        return out

    def decode_plan(self, rows: int, query: Tensor, k_cache: Tensor, v_cache: Tensor, window: int) -> Any:
        """The list of work of one kind of layer, for as many rows as any step has; its buffers stay."""
        shape = (query.shape[1], k_cache.shape[1], k_cache.shape[3], v_cache.shape[3])
        if rows > self._rows:
            return gpu.make_decode_plan(rows, *shape, k_cache.dtype, self.device, window=window)
        key = (*shape, window)
        if key not in self._plans:
            self._plans[key] = gpu.make_decode_plan(
                self._rows, *shape, k_cache.dtype, self.device, window=window
            )
        return self._plans[key]

    def _rope_store(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        slots: Tensor,
        *caches: Tensor,
        **options: Any,
    ) -> Tensor:
        if cos is None or sin is None:
            # Turning two dimensions by no angle is how a layer without RoPE passes through the same kernel.
            if self._still is None:
                ones = torch.ones(1, 1, device=self.device)
                self._still = (ones, torch.zeros_like(ones))
            (cos, sin), options["positions"] = self._still, torch.zeros_like(slots)
        query: Tensor = gpu.rope_store(_rowwise(qkv), cos, sin, slots, *caches, **options)
        return query

    # ---------------------------------------------------------------- norms and products

    def _rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        normed: Tensor = gpu.rms_norm(_rowwise(x), weight, eps, offset)
        return normed

    def make_norm(self, weight: Tensor, eps: float, offset: float, into: Sequence[object]) -> Normalize:
        if into and all(isinstance(product, Fp8Linear) for product in into):
            return lambda x: gpu.rms_norm_rows(_rowwise(x), weight, eps, offset)
        alone = super().make_norm(weight, eps, offset, into)
        inside = bool(into) and all(isinstance(product, GpuLinear) for product in into)
        if not inside or weight.numel() % NORM_WIDTH:
            return alone
        row_norm = gpu.RowNorm(weight, eps, offset)

        def norm(x: Tensor) -> Any:
            return Unnormed(x, row_norm) if x.shape[0] <= NORM_ROWS else alone(x)

        return norm

    def make_linear(
        self, weights: Sequence[Weight], biases: Sequence[Tensor | None], gate: str | None
    ) -> Product:
        if self.quantization == "fp8_dynamic":
            return Fp8Linear(join(weights), join_biases(weights, biases), gate)
        weight = self._held(joined_groups(weights))
        if weight is None:
            weight = self._quantized(join(weights))
        return self._product(weight, join_biases(weights, biases), gate)

    @staticmethod
    def _held(weight: Groups | None) -> Any:
        """A packed weight [..., out, in] as products read it; None where none does."""
        if weight is None:
            return None
        try:
            return gpu.hold(weight)
        except ValueError:
            return None

    def _product(self, weight: Any, bias: Tensor | None, gate: str | None) -> GpuLinear:
        product = GpuLinear(self, weight, bias, gate)
        if product.workspace_floats > self.linear_space.partial.numel():
            self.linear_space = gpu.make_linear_workspace(self.device, product.workspace_floats)
        return product

    def make_exact(self, weight: Weight, bias: Tensor | None) -> Product:
        return self._product(join([weight]).contiguous(), bias, None)

    def make_router(self, weight: Weight, bias: Tensor | None) -> Router:
        """Logits in float32 of a product that sums in one order for every number of rows."""
        held = join([weight]).contiguous()

        def router(x: Tensor) -> Tensor:
            few = x.shape[0] <= SKINNY_ROWS
            logits: Tensor = gpu.linear(
                _rowwise(x.to(held.dtype)),
                held,
                bias=bias,
                tile_rows=None if few else SKINNY_TILE,
                out=torch.empty(x.shape[0], held.shape[0], dtype=torch.float32, device=x.device),
                workspace=self.linear_space if few else None,
            )
            return logits

        return router

    def _quantized(self, weight: Tensor) -> Any:
        """The weight [..., out, in] in the format that was asked for; raises LoadError where it can't be."""
        if self.quantization is None:
            return weight.contiguous()
        ways = {"fp8": gpu.quantize_fp8, "int8": gpu.quantize_int8, "int4": gpu.quantize_int4}
        try:
            return ways[self.quantization](weight)
        except ValueError as error:
            raise LoadError(f"quantization {self.quantization}: {error}") from None

    def make_mixture(
        self,
        gate_up: Experts,
        down: Experts,
        activation: str,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Mixture:
        if self.quantization == "fp8_dynamic":
            raise LoadError("quantization fp8_dynamic isn't done for a mixture of experts yet; say fp8")
        held = [self._experts(weights) for weights in (gate_up, down)]
        tile = DECODE_TILE if self.deterministic else None
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        mix = partial(
            gpu.mixture, gate_up=held[0], down=held[1], activation=activation, tile_rows=tile, **biases
        )
        return lambda x, ids, weights, residual: mix(x, ids, weights, residual=residual)

    def _experts(self, weights: Experts) -> Any:
        held = self._held(stacked(weights.groups())) if isinstance(weights, GroupExperts) else None
        return self._quantized(full(weights)) if held is None else held

    # ---------------------------------------------------------------- layers that carry a state

    def make_conv(self, conv: Conv) -> Convolve:
        bias = None if conv.bias is None else conv.bias.float().contiguous()
        held = replace(conv, weight=conv.weight.T.float().contiguous(), bias=bias)
        return lambda x, state, rows: gpu.causal_conv(_rowwise(x), held, state, rows)

    def make_recurrence(self, rule: Rule) -> Recur:
        skip = None if rule.skip is None else rule.skip.float().contiguous()
        held = replace(
            rule,
            rate=rule.rate.float().contiguous(),
            step_bias=rule.step_bias.float().contiguous(),
            skip=skip,
        )
        return lambda x, gates, state, rows: gpu.recur(_rowwise(x), _rowwise(gates), held, state, rows)

    def make_gated_norm(self, norm: GatedNorm) -> GatedNormalize:
        held = replace(norm, weight=norm.weight.contiguous())
        return lambda x, gate: gpu.gated_norm(_rowwise(x), _rowwise(gate), held)

    # ---------------------------------------------------------------- the vocabulary's rows

    def make_embedding(self, weight: Weight, head: Product | None) -> Lookup:
        table = join([weight])
        return lambda ids: functional.embedding(ids, table)

    # ---------------------------------------------------------------- sampling

    def adjust(self, logits: Tensor, changes: Adjustments) -> Tensor:
        """One pass for bias and penalties, which leaves the raw rows readable; nothing to do returns them."""
        if not changes:
            return logits
        rows, width = logits.shape
        out = self._adjusted[:rows] if self._adjusted is not None and rows <= self._rows else None
        if out is not None and out.shape[1] != width:
            out = None
        bias = None if changes.bias is None else gpu.Bias(*changes.bias)
        first = gpu.Penalties(*changes.penalties[0].arguments) if changes.penalties else None
        work: Tensor = gpu.adjust_logits(logits, bias=bias, penalties=first, out=out)
        for penalties in changes.penalties[1:]:
            gpu.apply_penalties(work, *penalties.arguments)
        if changes.mask is not None:
            gpu.apply_bitmask(work, *changes.mask)
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
        rows, width = logits.shape
        flags = torch.empty(rows, dtype=torch.int32, device=logits.device)
        fits = rows <= self._rows and width == self._width
        lines, counts = (None, None) if counted is None else counted
        tokens: Tensor = gpu.sample(
            logits,
            *settings,
            filtered=filtered,
            slots=lines,
            output_counts=counts,
            flags=flags,
            workspace=self._sampling_space if fits else None,
            out=out,
        )
        return tokens, flags

    def _token_logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        fits = logits.shape[0] <= self._rows and logits.shape[1] == self._width
        found: tuple[Tensor, Tensor, Tensor] = gpu.token_logprobs(
            logits, chosen, top, workspace=self._logprobs_space if fits else None
        )
        return found


@dataclass(slots=True)
class StepPlans:
    """One step's lists of work, filled when its first layer of each kind comes by."""

    kernels: GpuKernels
    decodes: int
    _decode: dict[tuple[int, ...], Any] = field(default_factory=dict)
    _prefill: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def attend(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: tuple[Tensor, Tensor, Tensor],
        **options: Any,
    ) -> Tensor:
        """`reference.paged_attention`; the step's first `decodes` rows have one token each."""
        query, window = _rowwise(query), int(options.get("window", 0))
        _, seq_lens, query_start = lengths
        key = (query.shape[1], k_cache.shape[1], k_cache.shape[3], v_cache.shape[3], window)
        if self.decodes and key not in self._decode:
            plan = self.kernels.decode_plan(self.decodes, query, k_cache, v_cache, window)
            gpu.plan_decode(plan, seq_lens[: self.decodes])
            self._decode[key] = plan
        if self.decodes < seq_lens.shape[0] and key[:-1] not in self._prefill:
            self._prefill[key[:-1]] = gpu.plan_prefill(query, k_cache, v_cache, query_start[self.decodes :])
        out: Tensor = gpu.paged_attention(
            query,
            k_cache,
            v_cache,
            *lengths,
            **options,
            decodes=self.decodes,
            decode_plan=self._decode.get(key),
            prefill_plan=self._prefill.get(key[:-1]),
        )
        return out

    def of_decodes(self, count: int) -> StepPlans:
        return StepPlans(self.kernels, count)


@dataclass(frozen=True, slots=True)
class Unnormed:
    """Rows [T, in], T ≤ NORM_ROWS, that each product norms as it reads them: a launch less."""

    x: Tensor
    norm: Any  # gpu.RowNorm


class GpuLinear:
    """A weight [out, in], contiguous or quantized, with what follows its product; the module says which product."""

    def __init__(self, kernels: GpuKernels, weight: Any, bias: Tensor | None, gate: str | None) -> None:
        self.weight, self.bias, self.gate = weight, bias, gate
        self._kernels = kernels
        self._plain = isinstance(weight, Tensor)

    @property
    def workspace_floats(self) -> int:
        """Partial sums of `SKINNY_ROWS` rows."""
        data, _, group = stored(self.weight)
        rows, inputs = data.shape[0], data.shape[1] * (2 if group else 1)
        outputs, bits = rows if self.gate is None else rows // 2, 4 if group else 8 * data.element_size()
        config = linear_config(outputs, inputs, self.gate is not None, bits)
        return config.splits * SKINNY_ROWS * rows if config.splits > 1 else 0

    def __call__(
        self, x: Tensor | Unnormed, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x [T, in], residual [T, out] or None → [T, out], in `out` if given."""
        if isinstance(x, Unnormed):
            return self._ours(x.x, residual, out, x.norm)
        if x.shape[0] <= SKINNY_ROWS or self._kernels.deterministic or not self._plain:
            return self._ours(x, residual, out)
        if residual is None and self.gate is None and self.bias is None:
            return torch.mm(x, self.weight.T, out=out)
        if residual is not None and self.gate is None and self.bias is None:
            return torch.addmm(residual, x, self.weight.T, out=out)
        result = functional.linear(x, self.weight, self.bias)
        if self.gate is not None:
            result = gpu.activation_mul(result, self.gate)
        result = result if residual is None else result.add_(residual)
        return result if out is None else out.copy_(result)

    def _ours(
        self, x: Tensor, residual: Tensor | None, out: Tensor | None, norm: Any | None = None
    ) -> Tensor:
        many = x.shape[0] > SKINNY_ROWS
        result: Tensor = gpu.linear(
            _rowwise(x),
            self.weight,
            bias=self.bias,
            activation=self.gate,
            residual=residual,
            norm=norm,
            tile_rows=SKINNY_TILE if many and self._kernels.deterministic else None,
            out=out,
            # Partial sums of many rows may not fit the shared workspace: such calls bring their own.
            workspace=None if many else self._kernels.linear_space,
        )
        return result


def _rowwise(x: Tensor) -> Tensor:
    """x as the kernels read it: everything behind the first dimension contiguous."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != expected and size != 1:
            return x.contiguous()
        expected *= size
    return x

"""The ways a step's tokens go through a model; `guards.py` tells which are right for it.

    decoder      the fused decoder on our kernels
    paged        the model's own code, sibling linears fused, attention through the paged cache
    sequential   the model's own code and cache, one sequence at a time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tokenmill.engine import attention, decoder_spec, fusion, kv_cache
from tokenmill.engine.attention import AttentionMetadata, LayerSpec
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.input_batch import StepInputs
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.scheduler import Step
from tokenmill.engine.sequential import SequentialModel


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the KV cache holds: blocks of tokens, and the bytes that a token takes in it."""

    num_blocks: int
    block_size: int
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        return self.num_blocks * self.block_size


class Forward(Protocol):
    """Logits [S + N, V] of the rows that a step needs."""

    name: str
    """For people: which way this is."""
    capacity: Capacity
    splits_prompts: bool
    """Whether a prompt may be computed in chunks, prefixes shared and drafts taken back."""

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor: ...

    def start(self, slot: int) -> None:
        """Another sequence takes over a slot."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy KV blocks [n] int64."""


class PagedForward:
    """Through the paged KV cache: by the fused decoder or the model's own code."""

    splits_prompts = True

    def __init__(self, model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels) -> None:
        assert model.module is not None
        layers = attention.probe_layers(model.module)
        num_blocks = kv_cache.count_blocks(config, layers, model.dtype, model.device, model.max_context)
        token_bytes = kv_cache.block_bytes(layers, 1, model.dtype)
        self.capacity = Capacity(num_blocks, config.block_size, token_bytes)
        self._kernels = kernels
        self._cache = kv_cache.allocate(layers, num_blocks, config.block_size, model.dtype, model.device)
        self._logits, self.name = self._build(model, config, layers)

    def _build(
        self, model: LoadedModel, config: EngineConfig, layers: list[LayerSpec]
    ) -> tuple[ModelLogits, str]:
        form, module = model.verdict.decoder, model.module
        assert module is not None
        if form is not None and config.fused_decoder:
            described = decoder_spec.describe(module, layers, model.max_context, form == "interleaved")
            model.module = module = None
            self._kernels.own_threads()
            return Decoder(described, self._kernels), f"fused decoder, {self._kernels.name} kernels"
        if model.verdict.fusible:
            fusion.fuse_siblings(module)
        return _OwnCode(module), f"its own code, {self._kernels.name} kernels"

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        metadata = AttentionMetadata(
            self._kernels,
            self._cache.caches,
            inputs.slots,
            inputs.block_table,
            inputs.seq_lens,
            inputs.query_start,
        )
        return self._logits(inputs.input_ids, inputs.positions, metadata, inputs.logits_index)

    def start(self, slot: int) -> None:
        """Nothing to do: blocks belong to sequences, not to slots."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        for k_cache, v_cache in self._cache.caches:
            self._kernels.copy_blocks(k_cache, v_cache, source, target)


class ModelLogits(Protocol):
    """Logits [N, V] of tokens [T] int64 at `positions` [T], at rows `logits_index` [N]."""

    def __call__(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, logits_index: Tensor | None
    ) -> Tensor: ...


class _OwnCode:
    """The model's own modelling code, with our attention in it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, logits_index: Tensor | None
    ) -> Tensor:
        return attention.forward(self._module, input_ids, positions, metadata, logits_index)


class SequentialForward:
    """Through the model's own cache. Blocks are only counted here, enough for every slot's longest sequence."""

    name = "its own code and cache, one sequence at a time (slow)"
    splits_prompts = False

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        blocks = config.max_batch * -(-model.max_context // config.block_size)
        self.capacity = Capacity(blocks, config.block_size, 0.0)
        assert model.module is not None
        self._model = SequentialModel(model.module)

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        return self._model(step, inputs)

    def start(self, slot: int) -> None:
        self._model.start(slot)

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Nothing to do: forks copy the model's own cache."""


@torch.no_grad()
def build_forward(model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels) -> Forward:
    """The fastest way that is right for this model. Takes its weights over."""
    if model.verdict.refusal is not None:
        return SequentialForward(model, config)
    return PagedForward(model, config, kernels)

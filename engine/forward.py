"""The ways a step's tokens go through a model; `guards.py` tells which are right for it.

decoder      the fused decoder on our kernels
paged        the model's own code, sibling linears fused, attention through the paged cache
sequential   the model's own code and cache, one sequence at a time
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from tokenmill.engine import attention, cpu_tape, fusion, kv_cache
from tokenmill.engine.attention import AttentionMetadata, Kept, LayerSpec
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cpu_tape import TracingKernels
from tokenmill.engine.cuda_graph import StaticRows
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.describe import describe, kept_by
from tokenmill.engine.input_batch import StepInputs
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.sequential import SequentialModel
from tokenmill.engine.stand_ins import describe_around
from tokenmill.engine.step import Step

PROFILE_TOKENS = 8192
PROFILE_BLOCKS = 1
SMALL_STEPS = ((1,), (1, 7), (1, 15), (1, 20))
"""Tokens of each sequence: a decode that no graph runs, and short prompts beside one, for each tile of the products."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the KV cache holds: blocks of tokens, and the bytes that a token takes in it."""

    num_blocks: int
    block_size: int
    bytes_per_token: float
    history: int | None = None
    """Free blocks whose contents are kept before blocks are taken whose memory was never used; None: no limit."""
    snapshots: int = 0
    """Copies of states that there is room for, in the lines behind those of `max_batch` sequences and of nobody."""

    @property
    def tokens(self) -> int:
        return self.num_blocks * self.block_size


class Forward(Protocol):
    """Logits [S + N, V] of the rows that a step needs."""

    name: str
    """For people: which way this is."""
    capacity: Capacity
    splits_prompts: bool
    """Whether a prompt may be computed in chunks."""
    shares_prefixes: bool
    """Whether each token's part of the cache stands by itself: prefixes can be shared and drafts taken back."""

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor: ...

    def touch_next(self) -> bool:
        """In an idle moment: make some of the cache's memory ready. False once there is nothing more to do."""

    def start(self, slot: int) -> None:
        """Another sequence takes over a slot."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy KV blocks [n] int64."""

    def copy_states(self, source: Tensor, target: Tensor) -> None:
        """Copy what layers carry for the sequences of slots [n] int64."""


class PagedForward:
    """Through the paged KV cache: by the fused decoder or the model's own code."""

    splits_prompts = True

    def __init__(self, model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels) -> None:
        dtype = _cache_dtype(model, config, kernels)
        self._kernels = kernels
        self._block_size = config.block_size or kernels.block_size(dtype)
        self._logits, self.name, layers = self._build(model, config)
        self._layers = layers
        self.shares_prefixes = all(isinstance(layer, LayerSpec) for layer in layers)
        make_cache = partial(
            kv_cache.allocate,
            layers,
            block_size=self._block_size,
            dtype=dtype,
            device=model.device,
            state_dtype=model.dtype,
        )
        snapshots = kv_cache.count_snapshots(
            config, layers, model.dtype, model.device, model.size.weight_bytes
        )
        self._sequences = config.max_batch + snapshots
        self._cache = make_cache(num_blocks=PROFILE_BLOCKS)
        activations = self._profile(model, config) if model.device.type == "cuda" else 0
        self._cache = kv_cache.KVCache([])
        num_blocks = self._count_blocks(model, config, dtype, activations)
        token_bytes = kv_cache.block_bytes(layers, 1, dtype) * config.tensor_parallel
        block_bytes = token_bytes * self._block_size
        history = kv_cache.history(config, model.device, block_bytes, model.size.weight_bytes)
        self.capacity = Capacity(num_blocks, self._block_size, token_bytes, history, snapshots)
        self._cache = make_cache(num_blocks=num_blocks, sequences=self._sequences)
        self._touches = self._cache.touches()
        self._speed_up(dtype)

    def _count_blocks(
        self, model: LoadedModel, config: EngineConfig, dtype: torch.dtype, activations: int
    ) -> int:
        """How many blocks the cache has; raises MemoryError where there is no room for one."""
        aside = activations + (self._sequences + 1) * kv_cache.state_bytes(self._layers, model.dtype)
        return kv_cache.count_blocks(
            config, self._layers, dtype, model.device, model.max_context, self._block_size, aside
        )

    def _speed_up(self, dtype: torch.dtype) -> None:
        """Make a step one call, where the decoder can be recorded."""
        if isinstance(self._logits, Decoder) and isinstance(self._kernels, TracingKernels):
            self._logits = cpu_tape.record(self._logits, self._cache.caches, dtype) or self._logits

    @torch.inference_mode()
    def _profile(self, model: LoadedModel, config: EngineConfig) -> int:
        """Bytes that a step of the most tokens takes beside weights and cache; compiles the kernels on the way.

        It is as many sequences as there may be, of equal lengths, in one block: what counts is how much there is.
        The small steps before it are those of the kernels that large and captured steps leave out.
        """
        tokens, device = config.max_batch_tokens or PROFILE_TOKENS, model.device
        rows = min(tokens, config.max_batch)
        largest = [tokens // rows] * (rows - 1) + [tokens - tokens // rows * (rows - 1)]

        def run_small_steps() -> None:
            for counts in SMALL_STEPS:
                self._run_dry(counts, device)

        def run_steps() -> None:
            run_small_steps()
            self._run_dry(largest, device)

        if isinstance(self._logits, Decoder) and config.tensor_parallel == 1:  # ranks must stay in step
            self._kernels.compile_ahead(run_steps)
        run_small_steps()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._run_dry(largest, device)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        return peak

    def _run_dry(self, counts: Sequence[int], device: torch.device) -> None:
        """A step of sequences that are so many tokens long, single ones first.

        All is written to block 0, and to the states of nobody.
        """
        zeros = torch.zeros(sum(counts), dtype=torch.int64, device=device)
        lengths = torch.tensor(counts, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        width = -(-max(counts) // self._block_size)
        table = torch.zeros(len(counts), width, dtype=torch.int32, device=device)
        lines = torch.zeros(len(counts), dtype=torch.int64, device=device)
        metadata = self._metadata(zeros, table, lengths, starts, sum(count == 1 for count in counts), lines)
        self._logits(zeros, zeros, metadata, starts[1:].long() - 1)

    def _build(self, model: LoadedModel, config: EngineConfig) -> tuple[ModelLogits, str, list[Kept]]:
        """What computes logits, what it is called, and what each of its layers keeps."""
        form, module = model.verdict.decoder, model.module
        assert module is not None
        layers = attention.probe_layers(module)
        if form is not None and config.fused_decoder:
            read_off = partial(describe, module, layers, model.max_context, form == "interleaved")
            described = describe_around(read_off, module, model.blocks)
            model.module, model.blocks, module = None, {}, None
            self._kernels.own_threads()
            kept = kept_by(described)
            return Decoder(described, self._kernels), f"fused decoder, {self._kernels.name} kernels", kept
        _require_full_weights(model, config)
        if model.verdict.fusible:
            fusion.fuse_siblings(module)
        own: ModelLogits = partial(attention.forward, module)
        return own, f"its own code, {self._kernels.name} kernels", list(layers)

    def _metadata(
        self,
        slots: Tensor,
        table: Tensor,
        seq_lens: Tensor,
        query_start: Tensor,
        decodes: int,
        lines: Tensor | None = None,
    ) -> AttentionMetadata:
        plans = self._kernels.plan_attention(decodes)
        return AttentionMetadata(
            self._kernels, self._cache.caches, slots, table, seq_lens, query_start, plans, lines
        )

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        metadata = self._metadata(
            inputs.slots,
            inputs.block_table,
            inputs.seq_lens,
            inputs.query_start,
            inputs.decodes,
            inputs.chunk_rows,
        )
        return self._logits(inputs.input_ids, inputs.positions, metadata, inputs.logits_index)

    @property
    def can_be_captured(self) -> bool:
        """Whether `decode` may be captured: the fused decoder on kernels that never ask the device."""
        return isinstance(self._logits, Decoder) and self._kernels.captures

    def decode(self, tokens: Tensor, rows: StaticRows, out: Tensor) -> Tensor:
        """Logits [R, V] in `out` of one token [R] a row of the static buffers."""
        assert isinstance(self._logits, Decoder)
        count = tokens.shape[0]
        metadata = self._metadata(
            rows["slots"][:count],
            rows.table[:count],
            rows["seq_lens"][:count],
            rows.query_start[: count + 1],
            count,
            rows["rows"][:count],
        )
        return self._logits(tokens, rows["positions"][:count], metadata, None, out)

    @torch.inference_mode()
    def teacher_forced(self, tokens: Tensor, steps: list[int]) -> Tensor:
        """Logits [T, V] of one text [T] int64, computed in `steps` of so many tokens each; for checks.

        It writes the first blocks of the cache, which no request may hold meanwhile.
        """
        size, device = self.capacity.block_size, tokens.device
        positions = torch.arange(len(tokens), device=device)
        table = torch.arange(1, 1 + -(-len(tokens) // size), dtype=torch.int32, device=device)[None]
        parts, done = [], 0
        for count in steps:
            now = slice(done, done + count)
            done += count
            lengths = torch.tensor([done], dtype=torch.int32, device=device)
            borders = torch.tensor([0, count], dtype=torch.int32, device=device)
            decodes, line = int(count == 1), torch.zeros(1, dtype=torch.int64, device=device)
            metadata = self._metadata(positions[now] + size, table, lengths, borders, decodes, line)
            parts.append(self._logits(tokens[now], positions[now], metadata, None))
        return torch.cat(parts)

    def touch_next(self) -> bool:
        return next(self._touches, False) is None

    def start(self, slot: int) -> None:
        """Nothing to do: blocks belong to sequences, not to slots."""

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        for layer, (k_cache, v_cache) in zip(self._layers, self._cache.caches, strict=True):
            if isinstance(layer, LayerSpec) and layer.kv_heads:
                self._kernels.copy_blocks(k_cache, v_cache, source, target)

    def copy_states(self, source: Tensor, target: Tensor) -> None:
        for layer, states in zip(self._layers, self._cache.caches, strict=True):
            for state in () if isinstance(layer, LayerSpec) else states:
                self._kernels.copy_states(state, source, target)


def _cache_dtype(model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels) -> torch.dtype:
    """What the cache holds; raises LoadError where these kernels can't."""
    if config.kv_cache.dtype == "auto":
        return model.dtype
    if not kernels.fp8_cache:
        raise LoadError(
            f"{config.source}: an fp8 KV cache needs a GPU and its kernels; leave kv_cache.dtype out"
        )
    return torch.float8_e4m3fn


class ModelLogits(Protocol):
    """Logits [N, V] of tokens [T] int64 at `positions` [T], at rows `logits_index` [N]."""

    def __call__(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata, logits_index: Tensor | None
    ) -> Tensor: ...


class SequentialForward:
    """Through the model's own cache. Blocks are only counted here, enough for every slot's longest sequence."""

    splits_prompts = shares_prefixes = False

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        block_size = config.block_size or ReferenceKernels().block_size(model.dtype)
        blocks = config.max_batch * -(-model.max_context // block_size)
        self.capacity = Capacity(blocks, block_size, 0.0)
        assert model.module is not None
        self._model = SequentialModel(model.module)
        cache = (
            "and cache" if self._model.keeps_cache else "without a cache, each token computing its text anew"
        )
        self.name = f"its own code {cache}, one sequence at a time (slow)"

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        return self._model(step, inputs)

    def touch_next(self) -> bool:
        return False

    def start(self, slot: int) -> None:
        self._model.start(slot)

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Nothing to do: forks copy the model's own cache."""

    def copy_states(self, source: Tensor, target: Tensor) -> None:
        """Nothing to do, as before."""


def _require_full_weights(model: LoadedModel, config: EngineConfig) -> None:
    """A model's own code multiplies with weights as they are; raises LoadError where others are asked for."""
    if config.quantization is not None:
        raise LoadError(
            f"{config.source}: quantization {config.quantization} needs the fused decoder, "
            f"which doesn't run a {model.model_type}"
        )


@torch.no_grad()
def build_forward(model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels) -> Forward:
    """The fastest way that is right for this model. Takes its weights over."""
    verdict = model.verdict
    if verdict.refusal is not None or (verdict.carries and not config.fused_decoder):
        _require_full_weights(model, config)
        if verdict.carries:
            assert model.module is not None
            model.module.set_attn_implementation("eager")
        return SequentialForward(model, config)
    return PagedForward(model, config, kernels)

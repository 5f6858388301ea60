"""The border between transformers' modelling code and our paged KV cache.

A model loaded with `attn_implementation="tokenmill"` calls `paged_forward` wherever it attends. The step's
`AttentionMetadata` travels there as an extra keyword argument of the model's forward:

    model(input_ids [1, T], position_ids [1, T], tokenmill=metadata)
      └─ each attention layer: q, k, v [1, heads, T, dim] ──▶ paged_forward ──▶ store k, v; attend; [1, T, heads, dim]

The step's tokens are one flat row: chunks of prompts and single decode tokens of many sequences, one sequence
after the other. No mask is ever built: causality follows from the lengths in the metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from tokenmill.engine.kernel_set import AttentionPlans

NAME = "tokenmill"
FEW = 4
"""One in so many tokens: for more, layers that store nothing run on all tokens rather than on those with logits."""
_LAYER = "_tokenmill_layer"


class AttentionKernels(Protocol):
    """The kernels that attention needs; `kernels/reference.py` documents them."""

    store_kv: Callable[..., None]
    paged_attention: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer keeps a token: sizes of its cache, and how far back it looks (0: all).

    A layer that looks up what another one keeps has no KV heads of its own.
    """

    kv_heads: int
    key_size: int
    value_size: int
    window: int = 0

    def elements_per_token(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What one layer that carries a state keeps a sequence: `conv` [K - 1, C], and `state` [H, D, E] in float32."""

    conv: tuple[int, int]
    state: tuple[int, int, int] | None


Kept = LayerSpec | StateSpec


@dataclass(slots=True)
class AttentionMetadata:
    """Where the tokens of one step stand: T tokens of R sequences.

    `caches[i]` is layer i's (k_cache [B, G, S, D], v_cache [B, G, S, E]), or its states
    (conv [L, K - 1, C], state [L, H, D, E]), of which `lines` names each sequence's.
    """

    kernels: AttentionKernels
    caches: list[tuple[Tensor, Tensor]]
    slots: Tensor  # [T] int64
    block_table: Tensor  # [R, P] int32
    seq_lens: Tensor  # [R] int32
    query_start: Tensor  # [R + 1] int32
    plans: AttentionPlans | None = None
    """What the kernels share between layers, where they share anything."""
    lines: Tensor | None = None  # [R] int64

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whose states this step continues (`kernels/recurrent.py`)."""
        assert self.lines is not None, "the step of a model that carries states says whose they are"
        return self.lines, self.seq_lens, self.query_start

    def alone(self, index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens `index` [N] int64 as sequences that end with them and bring nothing else.

        Their positions, block table, sequence lengths and query starts.
        """
        places = positions[index]
        rows = torch.searchsorted(self.query_start.long(), index, right=True) - 1
        starts = torch.arange(len(index) + 1, dtype=torch.int32, device=index.device)
        return places, self.block_table[rows], (places + 1).int(), starts

    def narrowed(self, index: Tensor, positions: Tensor) -> tuple[AttentionMetadata, Tensor] | None:
        """The step of tokens `index` `alone`, and their positions; None where these aren't few."""
        if len(index) * FEW > len(positions):
            return None
        places, table, lengths, starts = self.alone(index, positions)
        plans = None if self.plans is None else self.plans.of_decodes(len(index))
        return AttentionMetadata(
            self.kernels, self.caches, self.slots[index], table, lengths, starts, plans
        ), places

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Store key and value [T, G, ·], then attend with query [T, H, D]: [T, H, E]."""
        k_cache, v_cache = self.caches[layer]
        self.kernels.store_kv(key, value, k_cache, v_cache, self.slots)
        return self.look_up(layer, query, **options)

    def look_up(self, layer: int, query: Tensor, **options: Any) -> Tensor:
        """Attend with query [T, H, D] to what the cache holds, this step's keys included: [T, H, E]."""
        k_cache, v_cache = self.caches[layer]
        lengths = (self.block_table, self.seq_lens, self.query_start)
        if self.plans is not None:
            return self.plans.attend(query, k_cache, v_cache, lengths, **options)
        return self.kernels.paged_attention(query, k_cache, v_cache, *lengths, **options)


@dataclass(slots=True)
class LayerRecorder:
    """Stands in for the metadata during one forward of a single token and numbers the attention layers."""

    layers: list[LayerSpec] = field(default_factory=list)

    def record(self, module: nn.Module, key: Tensor, value: Tensor, window: int) -> None:
        if hasattr(module, _LAYER):
            raise ValueError(f"{type(module).__name__} attends twice in one forward")
        setattr(module, _LAYER, len(self.layers))
        self.layers.append(LayerSpec(key.shape[1], key.shape[3], value.shape[3], window))


def paged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tokenmill: AttentionMetadata | LayerRecorder | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function: query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] → [1, T, H, E]."""
    if tokenmill is None:
        raise RuntimeError(f"{type(module).__name__} doesn't pass the step's metadata on to its attention")
    if isinstance(tokenmill, LayerRecorder):
        tokenmill.record(module, key, value, sliding_window or 0)
        repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return repeated.transpose(1, 2).contiguous(), None
    out = tokenmill.attend(
        getattr(module, _LAYER),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation="tokenmill"` known to transformers. No mask function: the mask stays None."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, paged_forward)


class _NoProducts(TorchFunctionMode):
    """Linears give zeros without reading their weights."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.linear:
            x, weight = args[:2]
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def probe_layers(module: nn.Module, *, multiply: bool = True) -> list[LayerSpec]:
    """Number the attention layers by one forward of one token, and tell what each caches.

    Without `multiply` it computes next to nothing and reads no matrix of a mapped file: for models whose code
    asks for shapes alone. Raises ValueError when a layer attends more than once or none does.
    """
    for part in module.modules():
        if hasattr(part, _LAYER):
            delattr(part, _LAYER)
    recorder = LayerRecorder()
    device = next(module.parameters()).device
    with nullcontext() if multiply else _NoProducts():
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        forward(module, zero, zero, recorder)
    if not recorder.layers:
        raise ValueError(f"{type(module).__name__} never calls the attention interface")
    return recorder.layers


def forward(
    module: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    metadata: AttentionMetadata | LayerRecorder,
    logits_index: Tensor | None = None,
) -> Tensor:
    """Logits [N, V] of tokens `input_ids` [T] at `positions` [T] (int64), at rows `logits_index` [N] or all."""
    output = module(
        input_ids=input_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=0 if logits_index is None else logits_index,
        tokenmill=metadata,
    )
    logits: Tensor = output.logits[0]
    return logits

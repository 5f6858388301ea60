"""The paged KV cache's tensors and their size.

    one layer:  k [B + 1, G, S, D]   v [B + 1, G, S, E]

Block 0 belongs to nobody: what is computed for no request may be written there. Requests own blocks 1 to B.

    a layer that carries a state:  conv [N + 1, K - 1, C]   state [N + 1, H, D, E] float32

Sequences have one each, under the number of their slot; the one behind them is nobody's, and copies follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.engine.attention import Kept, LayerSpec, StateSpec
from tokenmill.engine.config import EngineConfig
from tokenmill.kernels.cpu import memory

CPU_GIB = 1.0
TOUCHED_BYTES = 128 * 2**20
"""Of a CPU's cache that are made ready before they are needed; the rest is taken as it is used."""
GPU_SNAPSHOTS = 0.05
"""Of a GPU's free memory that copies of states may take, at most four for each sequence."""
HISTORY_BYTES = 128 * 2**20
"""Of a CPU's cache that contents of ended requests may take before they are overwritten; more for a large model."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """All layers' tensors; `caches[i]` is layer i's (k, v) or (conv, state)."""

    caches: list[tuple[Tensor, Tensor]]

    def touches(self) -> Iterator[None]:
        """Make a CPU cache's first blocks ready, those of one tensor each time that the iterator is advanced."""
        tensors = [tensor for pair in self.caches for tensor in pair if tensor.is_cpu and tensor.nbytes]
        for tensor in tensors:
            if not memory.touch(tensor, 0, min(tensor.nbytes, TOUCHED_BYTES // len(tensors))):
                return
            yield


def block_bytes(layers: list[Kept], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    elements = sum(layer.elements_per_token() for layer in layers if isinstance(layer, LayerSpec))
    return elements * block_size * dtype.itemsize


def state_bytes(layers: list[Kept], dtype: torch.dtype) -> int:
    """Bytes of one sequence's states over all layers."""
    states = [layer for layer in layers if isinstance(layer, StateSpec)]
    return sum(math.prod(x.conv) * dtype.itemsize + math.prod(x.state or (0,)) * 4 for x in states)


def count_blocks(
    config: EngineConfig,
    layers: list[Kept],
    dtype: torch.dtype,
    device: torch.device,
    max_context: int,
    block_size: int,
    aside: int = 0,
) -> int:
    """How many blocks to allocate: as configured, else what the memory holds, never more than is of use.

    `aside` bytes of a GPU's free memory are left for the largest step, and for states. Of `kv_cache.gib` each rank
    takes its part.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    per_block = block_bytes(layers, block_size, dtype)
    gib = config.kv_cache.gib
    if device.type == "cuda" and gib is None:
        free, _ = torch.cuda.mem_get_info(device)
        available = free * config.kv_cache.memory_share - aside
    else:
        available = (CPU_GIB if gib is None else gib) * 2**30 / config.tensor_parallel
    useful = config.max_batch * -(-max_context // block_size)
    blocks = min(int(available // per_block), useful)
    if blocks < 1:
        raise MemoryError(
            f"no room for a KV cache: one block takes {per_block / 2**20:.1f} MiB, "
            f"{available / 2**20:.1f} MiB are to be had; lower max_batch or max_batch_tokens, or raise kv_cache.gib"
        )
    return blocks


def count_snapshots(
    config: EngineConfig, layers: list[Kept], dtype: torch.dtype, device: torch.device, weight_bytes: float
) -> int:
    """How many copies of sequences' states to have room for; on a CPU they take memory as they are made."""
    each = state_bytes(layers, dtype)
    if not each or not config.kv_cache.prefix_cache:
        return 0
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] * GPU_SNAPSHOTS
    else:
        room = max(HISTORY_BYTES, weight_bytes / 2)
    return min(int(room // each), 4 * config.max_batch)


def history(
    config: EngineConfig, device: torch.device, bytes_per_block: float, weight_bytes: float
) -> int | None:
    """How many blocks of ended requests to keep before memory is taken that was never used; None: no limit.

    Where nobody says how large a CPU's cache is to be, the process grows with its work, not up to the cache's size:
    what it keeps for requests to come may take half of what the weights do.
    """
    if device.type != "cpu" or config.kv_cache.gib is not None or config.num_blocks is not None:
        return None
    return int(max(HISTORY_BYTES, weight_bytes / 2) // bytes_per_block)


def allocate(
    layers: Sequence[Kept],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sequences: int = 0,
    state_dtype: torch.dtype | None = None,
) -> KVCache:
    """Zeroed tensors: stale NaNs must not meet a masked weight.

    Keys and values are held in `dtype`; the states of `sequences` sequences in `state_dtype` (None: the same), but
    for those of recurrences.
    """

    def tensors(layer: Kept) -> tuple[Tensor, Tensor]:
        if isinstance(layer, StateSpec):
            conv = _zeros((sequences + 1, *layer.conv), state_dtype or dtype, device)
            return conv, _zeros((sequences + 1, *(layer.state or (0,))), torch.float32, device)
        held = (num_blocks + 1, layer.kv_heads, block_size)
        return _zeros((*held, layer.key_size), dtype, device), _zeros(
            (*held, layer.value_size), dtype, device
        )

    return KVCache([tensors(layer) for layer in layers])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU the system's own zero pages, which take no memory and no time before they are used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return memory.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

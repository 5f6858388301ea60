"""Random inputs for the self-check and the tests. What no kernel may read or leave unwritten is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import FP8

POISON = float("nan")


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; inf where they disagree about what is finite."""
    out, reference = out.double().flatten(), reference.double().flatten()
    special = ~torch.isfinite(reference)
    if not torch.equal(out[special].nan_to_num(0.5), reference[special].nan_to_num(0.5)):
        return float("inf")
    difference = (out - reference)[~special]
    if not torch.isfinite(difference).all():
        return float("inf")
    scale = float(reference[~special].norm())
    error = float(difference.norm())
    return error / scale if scale > 0 else error


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN (of the largest value for integers), so that an element left unwritten shows."""
    value = POISON if dtype.is_floating_point else torch.iinfo(dtype).max
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(FP8)
    return torch.full(shape, value, dtype=dtype, device=device)


@dataclass(frozen=True)
class PagedCase:
    """One step's queries and a paged cache whose unused places hold NaN."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of `paged_attention`."""
        return (
            self.query, self.k_cache, self.v_cache, self.block_table, self.seq_lens, self.query_start,
        )  # fmt: skip


def paged_case(
    generator: torch.Generator,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int | None = None,
    block: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PagedCase:
    """Sequences of `seq_lens` tokens, the last `query_lens` of each being this step's, in shuffled blocks."""
    device = torch.device("cpu") if device is None else device
    value_size = size if value_size is None else value_size
    needed = [-(-length // block) for length in seq_lens]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=generator)
    table = torch.full((len(seq_lens), max([*needed, 1]) + 1), -1, dtype=torch.int32)
    caches = [torch.full((blocks, kv_heads, block, width), POISON) for width in (size, value_size)]
    taken = 0
    for row, (length, count) in enumerate(zip(seq_lens, needed, strict=True)):
        chosen = order[taken : taken + count]
        taken += count
        table[row, :count] = chosen.int()
        at = torch.arange(length)
        for cache in caches:
            values = torch.randn(length, kv_heads, cache.shape[3], generator=generator)
            cache[chosen[at // block], :, at % block] = values
    query = torch.randn(sum(query_lens), heads, size, generator=generator)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    cache_dtype = dtype if cache_dtype is None else cache_dtype
    return PagedCase(
        query.to(device, dtype),
        caches[0].to(device, cache_dtype),
        caches[1].to(device, cache_dtype),
        table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        starts.to(device),
    )

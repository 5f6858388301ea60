"""Paged attention on the CPU against kernels/reference.py, and each row against itself alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import reference
from tokenmill.kernels.cpu.attention import paged_attention, store_kv
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using

TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 2e-6}
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 700]


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


def laid_out(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Plain caches [B, G, S, D], [B, G, S, E] as the kernels lay them out."""
    blocks, kv_heads, size, _ = k_cache.shape
    mine = torch.full_like(k_cache, float("nan")), torch.full_like(v_cache, float("nan"))
    key, value = (
        x.transpose(1, 2).reshape(blocks * size, kv_heads, -1).contiguous() for x in (k_cache, v_cache)
    )
    store_kv(key, value, *mine, torch.arange(blocks * size))
    return mine


class Case:
    """A random step: sequences of several lengths, some with one query, some with a chunk, some with none."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        kv_heads, size = pick.choice([1, 2, 3]), pick.choice([16, 24, 64, 64, 80, 96, 128])
        heads, block_size = kv_heads * pick.choice([1, 2, 3, 5]), pick.choice([5, 8, 16, 32, 32, 64])
        value_size = pick.choice([size, size, 24, 32])
        lengths = [pick.choice(LENGTHS) for _ in range(pick.randint(1, 4))]
        chunks = [pick.choice([0, 1, length, min(length, 33), -(-length // 2)]) for length in lengths]
        width = max(-(-length // block_size) for length in lengths) + 2
        table = torch.randperm(len(lengths) * width, generator=generator).reshape(-1, width).int()
        for row, length in enumerate(lengths):
            table[row, -(-length // block_size) :] = -12345  # never to be followed
        blocks = table.numel()
        self.k_cache = torch.randn(blocks, kv_heads, block_size, size, generator=generator).to(dtype)
        self.v_cache = torch.randn(blocks, kv_heads, block_size, value_size, generator=generator).to(dtype)
        for row, length in enumerate(lengths):  # what lies after the last token may be anything
            if tail := length % block_size:
                self.v_cache[table[row, length // block_size], :, tail:] = float("nan")
                self.k_cache[table[row, length // block_size], :, tail:] = float("nan")
        self.caches = laid_out(self.k_cache, self.v_cache)
        self.table, self.lengths = table, torch.tensor(lengths, dtype=torch.int32)
        self.starts = torch.tensor([0, *chunks]).cumsum(0).int()
        self.query = torch.randn(sum(chunks), heads, size, generator=generator).to(dtype)
        self.options: dict[str, Any] = {
            "scale": size**-0.5 * pick.choice([1, 2]),
            "window": pick.choice([0, 0, 1, 7, 64, 100, 300]),
            "softcap": pick.choice([0.0, 0.0, 20.0]),
            "sinks": torch.randn(heads, generator=generator) if pick.random() < 0.3 else None,
        }

    def run(self) -> Tensor:
        return paged_attention(
            self.query, *self.caches, self.table, self.lengths, self.starts, **self.options
        )

    def expected(self) -> Tensor:
        clean = [torch.nan_to_num(x.float()) for x in (self.query, self.k_cache, self.v_cache)]
        return reference.paged_attention(*clean, self.table, self.lengths, self.starts, **self.options)

    def alone(self, row: int, query: int) -> Tensor:
        """One query of one sequence, its later tokens not there yet."""
        length = int(self.lengths[row]) - (int(self.starts[row + 1]) - query - 1)
        return paged_attention(
            self.query[query : query + 1],
            *self.caches,
            self.table[row : row + 1],
            torch.tensor([length], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            **self.options,
        )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", range(4))
def test_agrees_with_the_reference(isa: InstructionSet, dtype: torch.dtype, part: int) -> None:
    for seed in range(part * 12, part * 12 + 12):
        case = Case(seed, dtype)
        ours, theirs = case.run(), case.expected()
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm(), seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_alone(isa: InstructionSet, dtype: torch.dtype) -> None:
    for seed in range(100, 130):
        case = Case(seed, dtype)
        together = case.run()
        for row in range(case.lengths.numel()):
            first, last = int(case.starts[row]), int(case.starts[row + 1])
            for query in range(first, last, max(1, (last - first) // 3)):
                assert torch.equal(case.alone(row, query), together[query]), (seed, row, query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [255, 256, 257, 1030])
@pytest.mark.parametrize("block_size", [16, 32])
def test_long_contexts_split_into_parts(
    isa: InstructionSet, dtype: torch.dtype, length: int, block_size: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    blocks = -(-length // block_size)
    k_cache, v_cache = (
        torch.randn(blocks, 2, block_size, 64, generator=generator).to(dtype) for _ in range(2)
    )
    k_cache *= torch.linspace(0.2, 3, blocks)[:, None, None, None].to(dtype)  # the maximum moves
    query = torch.randn(1, 6, 64, generator=generator).to(dtype)
    table = torch.randperm(blocks, generator=generator)[None].int()
    arguments = (table, torch.tensor([length]).int(), torch.tensor([0, 1]).int())
    ours = paged_attention(query, *laid_out(k_cache, v_cache), *arguments, scale=0.125)
    theirs = reference.paged_attention(
        query.float(), k_cache.float(), v_cache.float(), *arguments, scale=0.125
    )
    assert (ours.float() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32])
def test_what_is_stored_for_nobody_changes_nothing(
    isa: InstructionSet, dtype: torch.dtype, block_size: int
) -> None:
    caches = [torch.rand(3, 2, block_size, 32).to(dtype) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    store_kv(*(torch.full((2, 2, 32), 7, dtype=dtype) for _ in range(2)), *caches, torch.tensor([-1, -1]))
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
    store_kv(
        *(torch.full((1, 2, 32), 7, dtype=dtype) for _ in range(2)), *caches, torch.tensor([block_size + 5])
    )
    for cache, old in zip(caches, before, strict=True):
        assert int((cache == 7).sum()) == 2 * 32, "one token, its neighbours as they were"
        assert torch.equal(cache[[0, 2]], old[[0, 2]])


def test_result_may_be_given_a_place(isa: InstructionSet) -> None:
    case = Case(3, torch.float32)
    out = torch.empty(case.query.shape[0], case.query.shape[1], case.v_cache.shape[3])
    arguments = (case.query, *case.caches, case.table, case.lengths, case.starts)
    assert paged_attention(*arguments, **case.options, out=out) is out
    assert torch.equal(out, case.run())


def test_what_does_not_fit_is_refused(isa: InstructionSet) -> None:
    cache, query = torch.zeros(2, 2, 16, 8), torch.zeros(1, 4, 8)
    table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [1], [0, 1]))
    with pytest.raises(ValueError, match="evenly"):
        paged_attention(torch.zeros(1, 3, 8), cache, cache, table, lengths, starts, scale=1.0)
    with pytest.raises(ValueError, match="k_cache"):
        paged_attention(query.bfloat16(), cache, cache, table, lengths, starts, scale=1.0)
    with pytest.raises(ValueError, match="block_table"):
        paged_attention(query, cache, cache, table.long(), lengths, starts, scale=1.0)
    with pytest.raises(ValueError, match="query_start"):
        paged_attention(query, cache, cache, table, lengths, starts[:1], scale=1.0)

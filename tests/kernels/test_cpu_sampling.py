"""The CPU's samplers against kernels/reference.py: every filter, ties, edges of size, and single rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import reference
from tokenmill.kernels.cpu import sampling
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


def full(rows: int, value: float) -> Tensor:
    return torch.full((rows,), float(value))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def settings(
    rows: int, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 3
) -> tuple[Tensor, ...]:
    seeds = torch.arange(rows) * 7919 + seed
    positions = torch.arange(rows) + 5
    ks = torch.full((rows,), top_k)
    return full(rows, temperature), full(rows, min_p), ks, full(rows, top_p), seeds, positions


def drawn_support(logits: Tensor, draws: int, **chosen: float) -> set[int]:
    """Ids that sampling one row reaches over many seeds."""
    many = logits.expand(draws, -1).contiguous()
    return set(sampling.sample(many, *settings(draws, **chosen)).tolist())  # type: ignore[arg-type]


def test_the_noise_is_the_same_hash(isa: InstructionSet) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(1 << 62), 1 << 62, (9,), generator=generator)
    seeds[0], seeds[1], seeds[2] = 0, -(1 << 63), (1 << 63) - 1
    positions = torch.randint(0, 1 << 20, (9,), generator=generator)
    tokens = torch.cat([torch.arange(40_000), ints((1 << 31) - 1, 262_143)])
    ours = sampling.gumbel_noise(seeds, positions, tokens)
    theirs = reference.gumbel_noise(seeds, positions, tokens)
    # One wrong bit of the hash would move a value anywhere; near zero the logarithm's own error is absolute.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 16384, 16385, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_best(isa: InstructionSet, size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    logits[1] = -float("inf")
    logits[2, size // 2 :] = 9.0
    logits[3, -1] = 100.0
    logits[4] = -0.0
    logits[4, size // 2 :] = 0.0
    assert torch.equal(sampling.first_argmax(logits), reference.first_argmax(logits.float()))
    for row in range(5):
        one = logits[row : row + 1].contiguous()
        assert torch.equal(sampling.first_argmax(one), reference.first_argmax(one.float()))


@pytest.mark.parametrize("size", [3, 200, 32_003])
def test_plain_draws_agree_with_the_reference(isa: InstructionSet, size: int) -> None:
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size)) * 3
    for temperature in (1e-6, 0.3, 1.0, 2.0):
        chosen = settings(40, temperature)
        assert torch.equal(sampling.sample(logits, *chosen), reference.sample(logits, *chosen))


@pytest.mark.parametrize("size", [1, 300, 9001])
@pytest.mark.parametrize(
    "chosen",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 40},
        {"top_k": 1000},
        {"top_k": 1 << 40},
        {"top_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"top_p": 0.99999},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
        {"top_p": 0.95, "min_p": 0.001, "temperature": 2.0},
    ],
)
def test_filtered_draws_agree_with_the_reference(
    isa: InstructionSet, size: int, chosen: dict[str, float]
) -> None:
    logits = torch.randn(10, size, generator=torch.Generator().manual_seed(size + 1)) * 4
    logits[3] = logits[3].round()  # many ties
    logits[4, : size // 2] = -float("inf")
    logits[5] = -float("inf")
    picked = settings(10, **chosen)  # type: ignore[arg-type]
    ours, theirs = sampling.sample(logits, *picked), reference.sample(logits, *picked)
    assert torch.equal(ours, theirs)
    alone = [sampling.sample(logits[i : i + 1], *(x[i : i + 1] for x in picked)) for i in range(10)]
    assert torch.equal(torch.cat(alone), ours)


def test_exactly_k_survive_a_tie(isa: InstructionSet) -> None:
    logits = torch.zeros(1, 500)
    logits[0, [7, 300]] = 1.0
    assert drawn_support(logits, 600, top_k=5) == {7, 300, 0, 1, 2}


def test_top_p_keeps_the_token_that_crosses(isa: InstructionSet) -> None:
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.125, 0.125]]))
    assert drawn_support(logits, 300, top_p=0.5) == {1}
    assert drawn_support(logits, 300, top_p=0.51) == {0, 1}
    assert drawn_support(logits, 300, top_p=0.76) == {0, 1, 2}
    assert drawn_support(logits, 300, top_p=1e-6) == {1}


@pytest.mark.parametrize("size", [4, 10, 64, 1000, 3000])
def test_uniform_rows_cut_where_the_reference_cuts(isa: InstructionSet, size: int) -> None:
    logits = torch.zeros(1, size)
    for top_p in (0.1, 0.25, 0.3, 0.5, 0.75, 0.9):
        kept = reference.filter_logits(logits, full(1, 0.0), ints(0), full(1, top_p)) > -float("inf")
        reached = drawn_support(logits, 20 * min(size, 64), top_p=top_p)
        assert max(reached) < int(kept.sum())
        if size <= 10:
            assert reached == set(range(int(kept.sum())))


def test_rows_keep_their_own_settings(isa: InstructionSet) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(64, 2000, generator=generator) * 3
    picked = (
        torch.rand(64, generator=generator) * 2 * (torch.rand(64, generator=generator) > 0.3),
        torch.rand(64, generator=generator) * 0.2 * (torch.rand(64, generator=generator) > 0.5),
        torch.randint(0, 60, (64,), generator=generator),
        (torch.rand(64, generator=generator) + 0.1).clamp(max=1.0),
        torch.randint(0, 1 << 40, (64,), generator=generator),
        torch.randint(0, 9999, (64,), generator=generator),
    )
    assert torch.equal(sampling.sample(logits, *picked), reference.sample(logits, *picked))


@pytest.mark.parametrize("size", [1, 16, 33, 5000, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 1, 20])
def test_logprobs(isa: InstructionSet, size: int, dtype: torch.dtype, top: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(6, size, generator=generator) * 5).to(dtype)
    logits[1] = logits[1].round()
    logits[2, : size // 2] = -float("inf")
    chosen = torch.randint(0, size, (6,), generator=generator)
    ours, theirs = sampling.token_logprobs(logits, chosen, top), reference.token_logprobs(logits, chosen, top)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, 31, 20_001])
def test_penalties_to_the_bit(isa: InstructionSet, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, generator=generator)
    counts = torch.randint(0, 3, (4, size), generator=generator, dtype=torch.int32)
    seen = torch.rand(4, size, generator=generator) > 0.7
    arguments = (
        *(ints(2, -1, 0, 3, -1), counts, seen),
        *(
            torch.tensor(x)
            for x in ([1.3, 2.0, 1.0, 0.7, 1.5], [0.5, 1.0, -1.0, 0.0, 2.0], [0.2, 1.0, 0.3, 0.0, 1.0])
        ),
    )
    ours, theirs = logits.clone(), logits.clone()
    sampling.apply_penalties(ours, *arguments)
    reference.apply_penalties(theirs, *arguments)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[1], logits[1])


@pytest.mark.parametrize("size", [1, 32, 33, 1000])
def test_bitmask(isa: InstructionSet, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(4, size, generator=generator)
    words = -(-size // 32)
    mask = torch.randint(-(1 << 31), 1 << 31, (2, words), generator=generator).to(torch.int32)
    mask[0, 0] = -1
    ours, theirs = logits.clone(), logits.clone()
    sampling.apply_bitmask(ours, ints(3, 1), mask)
    reference.apply_bitmask(theirs, ints(3, 1), mask)
    assert torch.equal(ours, theirs)


def test_no_rows_are_no_work(isa: InstructionSet) -> None:
    assert sampling.sample(torch.empty(0, 100), *settings(0)).shape == (0,)
    assert sampling.token_logprobs(torch.empty(0, 100), ints(), 3)[1].shape == (0, 3)


def test_shapes_that_do_not_fit_are_refused(isa: InstructionSet) -> None:
    with pytest.raises(ValueError, match="shape"):
        sampling.sample(torch.zeros(2, 10), *settings(3))
    with pytest.raises(ValueError, match="contiguous"):
        sampling.first_argmax(torch.zeros(10, 2).T)
    with pytest.raises(ValueError, match="bfloat16 and float32"):
        sampling.first_argmax(torch.zeros(2, 10, dtype=torch.float16))
    with pytest.raises(ValueError, match="cover"):
        sampling.apply_bitmask(torch.zeros(1, 64), ints(0), torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_without_a_finite_largest_logit_are_flagged(
    isa: InstructionSet, dtype: torch.dtype, filtered: bool, temperature: float
) -> None:
    logits = torch.randn(7, 40_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, 39_999] = float("nan")
    logits[2, 17] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("nan")
    logits[5, 100:] = float("-inf")
    chosen = settings(7, temperature=temperature, **({"top_k": 5, "top_p": 0.9} if filtered else {}))
    tokens, flags = sampling.draw(logits, *chosen)
    assert flags.tolist() == [False, True, True, True, True, False, False]
    assert torch.equal(tokens[[0, 5, 6]], reference.sample(logits.float(), *chosen)[[0, 5, 6]])

"""The sampling kernels, plain torch and C++, against the distributions that they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from tokenmill.engine.sampling_params import derive_seed
from tokenmill.kernels import reference
from tokenmill.kernels.cpu import library, sampling

KERNELS = {"torch": reference, "cpu": sampling}
DRAWS = 60_000
WIDTH = 40
SIGNIFICANCE = 1e-4


@pytest.fixture(params=list(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Any:
    """Each set of kernels that runs on a CPU."""
    if request.param == "cpu":
        assert library.current() is not None, "the C++ kernels must build where the tests run"
    return KERNELS[request.param]


def spread_logits(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def draw(
    kernels: Any, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, **settings: float
) -> torch.Tensor:
    rows = len(seeds)
    return kernels.sample(
        logits.expand(rows, -1).contiguous(),
        torch.full((rows,), settings.get("temperature", 1.0)),
        torch.full((rows,), settings.get("min_p", 0.0)),
        torch.full((rows,), int(settings.get("top_k", 0))),
        torch.full((rows,), settings.get("top_p", 1.0)),
        seeds,
        positions,
    )


def expected_distribution(logits: torch.Tensor, **settings: float) -> list[float]:
    """The promised probabilities, in plain Python and double precision."""
    scaled = [x / settings.get("temperature", 1.0) for x in logits.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    kept = [i for i in order if weights[i] >= settings.get("min_p", 0.0)]
    kept = kept[: int(settings.get("top_k", 0)) or None]
    total, nucleus, reached = sum(weights[i] for i in kept), [], 0.0
    for i in kept:
        nucleus.append(i)
        reached += weights[i] / total
        if reached >= settings.get("top_p", 1.0):
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in set(nucleus) else 0.0 for i in range(len(scaled))]


def check_distribution(tokens: torch.Tensor, probabilities: list[float]) -> None:
    """Chi-square over the tokens expected at least 5 times, the rarer ones pooled; nothing outside the support."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).tolist()
    expected = [p * len(tokens) for p in probabilities]
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    frequent = [i for i, e in enumerate(expected) if e >= 5]
    seen, wanted = [counts[i] for i in frequent], [expected[i] for i in frequent]
    rest = sum(expected) - sum(wanted)
    if rest >= 1:
        seen.append(sum(counts) - sum(seen))
        wanted.append(rest)
    if len(seen) > 1:
        scale = sum(seen) / sum(wanted)
        assert stats.chisquare(seen, [w * scale for w in wanted]).pvalue > SIGNIFICANCE


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.3, "top_p": 0.8, "top_k": 12, "min_p": 0.02},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.6, "min_p": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_filtered_distribution_over_seeds(kernels: Any, settings: dict[str, float]) -> None:
    logits = spread_logits()
    seeds = torch.tensor([derive_seed(i, 0) for i in range(DRAWS)])
    tokens = draw(kernels, logits, seeds, torch.zeros(DRAWS, dtype=torch.int64), **settings)
    check_distribution(tokens, expected_distribution(logits, **settings))


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[-3:], ids=str)
def test_draws_follow_it_along_one_stream(kernels: Any, settings: dict[str, float]) -> None:
    logits = spread_logits(1)
    seeds = torch.full((DRAWS,), derive_seed(42, 0))
    tokens = draw(kernels, logits, seeds, torch.arange(DRAWS), **settings)
    check_distribution(tokens, expected_distribution(logits, **settings))


def test_successive_draws_are_independent(kernels: Any) -> None:
    logits = torch.zeros(8)
    tokens = draw(kernels, logits, torch.full((DRAWS,), derive_seed(7, 0)), torch.arange(DRAWS))
    check_distribution(tokens[:-1] * 8 + tokens[1:], [1 / 64] * 64)


def test_streams_of_neighbouring_seeds_and_choices_are_independent(kernels: Any) -> None:
    logits = torch.zeros(8)
    positions = torch.zeros(DRAWS, dtype=torch.int64)
    seeds = torch.tensor([derive_seed(i, 0) for i in range(DRAWS + 1)])
    choices = torch.tensor([derive_seed(i, 1) for i in range(DRAWS)])
    first = draw(kernels, logits, seeds[:-1], positions)
    check_distribution(first * 8 + draw(kernels, logits, seeds[1:], positions), [1 / 64] * 64)
    check_distribution(first * 8 + draw(kernels, logits, choices, positions), [1 / 64] * 64)


@pytest.mark.parametrize("rare", [1e-3, 1e-4, 1e-5])
def test_rare_tokens_come_as_often_as_they_should(kernels: Any, rare: float) -> None:
    draws = 4_000_000
    logits = torch.tensor([math.log1p(-rare), math.log(rare)])
    tokens = draw(kernels, logits, torch.full((draws,), derive_seed(3, 0)), torch.arange(draws))
    count = int(tokens.sum())
    assert stats.binomtest(count, draws, rare).pvalue > SIGNIFICANCE


def test_noise_is_finite_in_both_tails_and_standard_gumbel(kernels: Any) -> None:
    noise = kernels.gumbel_noise(
        torch.tensor([derive_seed(i, 0) for i in range(40)]),
        torch.zeros(40, dtype=torch.int64),
        torch.arange(100_000),
    )
    assert bool(noise.isfinite().all())
    sample = noise.flatten()[::40].double().numpy()
    assert stats.kstest(sample, stats.gumbel_r.cdf).pvalue > SIGNIFICANCE
    assert float(noise.max()) > 13
    assert float(noise.min()) < -2.5


def test_noise_depends_on_seed_position_and_token_alone(kernels: Any) -> None:
    tokens = torch.arange(1000)
    seeds = torch.tensor([5, -9, 2**63 - 1, -(2**63)])
    positions = torch.tensor([0, 3, 10**6, 2**40])
    together = kernels.gumbel_noise(seeds, positions, tokens)
    for row in range(4):
        alone = kernels.gumbel_noise(seeds[row : row + 1], positions[row : row + 1], tokens[500:])
        assert torch.equal(alone[0], together[row, 500:])


def test_greedy_takes_the_lowest_of_equal_ids(kernels: Any) -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    ones = torch.ones(2)
    zeros = torch.zeros(2, dtype=torch.int64)
    for temperature in (0.0, 1e-6):
        tokens = kernels.sample(logits, ones * temperature, ones * 0, zeros, ones, zeros, zeros)
        assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9, 10, 11])
def test_top_k_keeps_exactly_k_of_ties_lowest_ids_first(k: int) -> None:
    logits = torch.tensor([[1.0, 5, 5, 5, 1, 1, 1, 1, 1, 1]])
    kept = reference.filter_logits(logits, torch.zeros(1), torch.tensor([k]), torch.ones(1))
    order = [1, 2, 3, 0, 4, 5, 6, 7, 8, 9]
    assert sorted(kept[0].isfinite().nonzero().flatten().tolist()) == sorted(order[:k])


def test_top_p_keeps_the_crossing_token_lowest_ids_first() -> None:
    logits = torch.zeros(1, 10)
    for top_p, kept in ((0.05, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.51, 6), (1.0, 10)):
        filtered = reference.filter_logits(
            logits.double(), torch.zeros(1), torch.tensor([0]), torch.tensor([top_p], dtype=torch.float64)
        )
        assert filtered[0].isfinite().nonzero().flatten().tolist() == list(range(kept)), top_p


def test_penalties_equal_a_plain_loop(kernels: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, WIDTH, generator=generator) * 3
    counts = torch.randint(0, 3, (8, WIDTH), generator=generator, dtype=torch.int32)
    seen = torch.rand(8, WIDTH, generator=generator) < 0.3
    slots = torch.tensor([3, -1, 0, 7, -1, 5])
    repetition = torch.tensor([1.3, 1.3, 0.8, 1.0, 2.0, 1.1])
    presence = torch.tensor([0.5, 2.0, -1.0, 0.0, 1.0, 2.0])
    frequency = torch.tensor([0.2, 2.0, 1.0, 0.7, 1.0, -2.0])
    expected = logits.clone().tolist()
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for token in range(WIDTH):
            value, count = expected[row][token], int(counts[slot, token])
            if count or bool(seen[slot, token]):
                factor = float(repetition[row])
                value = value / factor if value > 0 else value * factor
            value -= float(frequency[row]) * count + float(presence[row]) * (count > 0)
            expected[row][token] = value
    kernels.apply_penalties(logits, slots, counts, seen, repetition, presence, frequency)
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_bitmask_hides_the_zero_bits(kernels: Any) -> None:
    logits = torch.zeros(3, 70)
    allowed = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)) < 0.5
    words = (allowed.reshape(2, 3, 32).long() << torch.arange(32)).sum(-1)
    kernels.apply_bitmask(logits, torch.tensor([2, 0]), words.to(torch.int32))
    assert torch.equal(logits[2].isfinite(), allowed[0, :70])
    assert torch.equal(logits[0].isfinite(), allowed[1, :70])
    assert bool(logits[1].isfinite().all())


def test_logprobs_are_the_log_softmax(kernels: Any) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2)) * 5
    logits[0, 7] = logits[0, 3] = 40.0
    chosen = torch.tensor([3, 0, 299, 150, 7])
    values, ids, tops = kernels.token_logprobs(logits, chosen, 5)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(values.double(), exact.gather(1, chosen[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tops.double(), exact.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert ids[0, :2].tolist() == [3, 7]

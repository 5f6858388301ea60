"""The sampler's kernels under Triton's interpreter: logits, filters, noise, choice, logprobs."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu.cases import relative_error
from tokenmill.kernels.gpu.jit import jit, tl
from tokenmill.kernels.gpu.logits import Bias, Mask, Penalties
from tokenmill.kernels.gpu.logprobs import make_logprobs_workspace
from tokenmill.kernels.gpu.noise import gumbel, noise_key
from tokenmill.kernels.gpu.sampling import EMPTY_ROW, NAN_ROW, make_sampling_workspace

INF = float("inf")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_logits(rows: int, width: int, seed: int, ties: bool = False) -> Tensor:
    logits = torch.randn(rows, width, generator=generator(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def make_penalties(rows: int, width: int, seed: int) -> Penalties:
    g = generator(seed)
    slots = torch.randperm(rows + 2, generator=g)[:rows]
    slots[rows // 2] = -1
    return Penalties(
        slots,
        torch.randint(-2, 4, (rows + 2, width), generator=g).clamp(min=0).int(),
        torch.rand(rows + 2, width, generator=g) < 0.3,
        torch.rand(rows, generator=g) + 0.5,
        torch.randn(rows, generator=g),
        torch.randn(rows, generator=g),
    )


def make_mask(lines: int, width: int, seed: int) -> Tensor:
    high = 1 << 31
    return torch.randint(-high, high, (lines, -(-width // 32)), generator=generator(seed)).int()


@pytest.mark.parametrize("width", [31, 64, 4095, 4096, 4097])
def test_bias_penalties_and_mask_in_place(width: int) -> None:
    mine, penalties = make_logits(3, width, 0), make_penalties(3, width, 1)
    theirs = mine.clone()
    rows, tokens = torch.tensor([0, -1, 2, 2]), torch.tensor([width - 1, 5, 0, width - 1])
    values = torch.tensor([5.0, 1.0, -100.0, 100.0])
    gpu.apply_logit_bias(mine, rows, tokens, values)
    reference.apply_logit_bias(theirs, rows[rows >= 0], tokens[rows >= 0], values[rows >= 0])
    assert torch.equal(mine, theirs)
    fields = [getattr(penalties, name) for name in Penalties.__dataclass_fields__]
    gpu.apply_penalties(mine, *fields)
    reference.apply_penalties(theirs, *fields)
    assert relative_error(mine, theirs) < 1e-6
    bits = make_mask(3, width, 2)
    gpu.apply_bitmask(mine, torch.tensor([2, -1, 0]), bits)
    reference.apply_bitmask(theirs, torch.tensor([2, 0]), bits[[0, 2]])
    assert relative_error(mine, theirs) < 1e-6
    assert torch.equal(mine == -INF, theirs == -INF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_adjust_logits_leaves_the_raw_row(dtype: torch.dtype, with_bias: bool) -> None:
    width = 4100
    raw, penalties, bits = (
        make_logits(4, width, 3).to(dtype),
        make_penalties(4, width, 4),
        make_mask(2, width, 5),
    )
    before = raw.clone()
    bias = Bias(torch.tensor([1, -1, 3]), torch.tensor([4099, 0, 7]), torch.tensor([3.0, 9.0, -4.0]))
    mask = Mask(torch.tensor([-1, 1, 0, -1]), bits)
    out = gpu.adjust_logits(raw, bias=bias if with_bias else None, penalties=penalties, mask=mask)
    assert torch.equal(raw.view(torch.uint8), before.view(torch.uint8))
    expected = raw.float()
    if with_bias:
        reference.apply_logit_bias(expected, bias.rows[[0, 2]], bias.tokens[[0, 2]], bias.values[[0, 2]])
    reference.apply_penalties(
        expected, penalties.slots, penalties.output_counts, penalties.prompt_seen,
        penalties.repetition, penalties.presence, penalties.frequency,
    )  # fmt: skip
    reference.apply_bitmask(expected, torch.tensor([1, 2]), bits[[1, 0]])
    assert relative_error(out, expected) < 1e-6


def column(value: float, rows: int) -> Tensor:
    return torch.full((rows,), value)


SETTINGS = [
    # min_p, top_k, top_p
    (0.1, 0, 1.0),
    (0.0, 5, 1.0),
    (0.0, 0, 0.9),
    (0.02, 20, 0.7),
    (0.0, 3000, 0.99),
    (0.0, 1, 0.3),
    (0.0, 0, 0.001),
    (0.0, 0, 1.0),
]


@pytest.mark.parametrize(("min_p", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("width", [10, 1025, 5000])
def test_filters_are_exact(width: int, ties: bool, min_p: float, top_k: int, top_p: float) -> None:
    scaled = make_logits(1, width, width, ties)
    scaled[0, width // 3] = -INF
    settings = column(min_p, 1), torch.full((1,), top_k), column(top_p, 1)
    assert torch.equal(gpu.filter_logits(scaled, *settings), reference.filter_logits(scaled, *settings))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [*((k, 1.0) for k in (40, 130, 1023, 1024, 1025)), (40, 0.8), (1024, 0.8)]
)
def test_top_k_where_the_largest_values_share_lanes(top_k: int, top_p: float) -> None:
    """20 of 1,024 lanes hold 120 large values; the others are equal, all of them, or all but 500."""
    scaled = torch.zeros(2, 6000)
    large = torch.arange(6000) % 1024 < 20
    scaled[:, large] = 1 + torch.rand(int(large.sum()), generator=generator(1))
    scaled[1, 2000:2500] = 0.25 + torch.rand(500, generator=generator(2))
    settings = column(0.0, 2), torch.full((2,), top_k), column(top_p, 2)
    assert torch.equal(gpu.filter_logits(scaled, *settings), reference.filter_logits(scaled, *settings))


def test_filters_on_equal_and_extreme_values() -> None:
    scaled = torch.stack([
        torch.zeros(3000),
        torch.cat([torch.full((1500,), 0.0), torch.full((1500,), -0.0)]),
        torch.linspace(-1e38, 1e38, 3000),
        torch.cat([torch.full((2990,), -INF), torch.arange(10.0)]),
        torch.linspace(-1e-39, 1e-39, 3000),
    ])  # fmt: skip
    for top_k, top_p in ((7, 1.0), (2999, 1.0), (0, 0.30001), (50, 0.501)):
        settings = column(0.0, 5), torch.full((5,), top_k), column(top_p, 5)
        kept = gpu.filter_logits(scaled, *settings) > -INF
        assert torch.equal(kept, reference.filter_logits(scaled, *settings) > -INF)


def test_each_row_has_settings_of_its_own() -> None:
    scaled = make_logits(len(SETTINGS), 700, 6)
    columns = [torch.tensor(values) for values in zip(*SETTINGS, strict=True)]
    assert torch.equal(gpu.filter_logits(scaled, *columns), reference.filter_logits(scaled, *columns))


@jit
def _noise_kernel(
    seeds: tl.tensor, positions: tl.tensor, keys: tl.tensor, out: tl.tensor, N: tl.constexpr
) -> None:
    row, tokens = tl.program_id(0), tl.arange(0, N)
    key = noise_key(tl.load(seeds + row), tl.load(positions + row))
    tl.store(keys + row, key.to(tl.int64))
    tl.store(out + row * N + tokens, gumbel(key, tokens * 1021))


def test_noise_is_the_references() -> None:
    seeds = torch.tensor([0, -1, 1 << 62, -(1 << 63), 12345])
    positions = torch.tensor([0, 1, 131071, 7, 5])
    keys, noise = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4096)
    _noise_kernel[(5,)](seeds, positions, keys, noise, 4096)
    assert torch.equal(keys, reference.noise_keys(seeds, positions))
    expected = reference.gumbel_noise(seeds, positions, torch.arange(4096) * 1021)
    assert (noise - expected).abs().max() < 3e-6


def test_noise_keeps_its_tails() -> None:
    """The hash's extremes, which no sample reaches by luck: the float path alone, on crafted parts."""
    seeds, positions = torch.tensor([3]), torch.tensor([4])
    tokens = torch.arange(1 << 20)
    noise = reference.gumbel_noise(seeds, positions, tokens)
    extremes = torch.cat([noise[0].topk(8).indices, (-noise[0]).topk(8).indices]).int()
    out = torch.zeros(16)
    _tail_kernel[(1,)](seeds, positions, extremes, out, 16)
    assert (out - noise[0, extremes.long()]).abs().max() < 3e-6
    assert out.max() > 12.0


@jit
def _tail_kernel(
    seeds: tl.tensor, positions: tl.tensor, ids: tl.tensor, out: tl.tensor, N: tl.constexpr
) -> None:
    at = tl.arange(0, N)
    tl.store(out + at, gumbel(noise_key(tl.load(seeds), tl.load(positions)), tl.load(ids + at)))


def draw_arguments(rows: int, seed: int) -> list[Tensor]:
    g = generator(seed)
    high = 1 << 62
    return [
        torch.rand(rows, generator=g) * 1.5 * (torch.arange(rows) % 3 > 0),
        torch.rand(rows, generator=g) * 0.1 * (torch.arange(rows) % 4 == 1),
        torch.randint(0, 60, (rows,), generator=g),
        1.0 - torch.rand(rows, generator=g) * 0.5,
        torch.randint(-high, high, (rows,), generator=g),
        torch.randint(0, 1 << 17, (rows,), generator=g),
    ]


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(33, torch.float32), (4096, torch.bfloat16), (4097, torch.float32), (9000, torch.float16)],
)
def test_sample(width: int, dtype: torch.dtype) -> None:
    logits, arguments = make_logits(7, width, width).to(dtype), draw_arguments(7, width)
    assert torch.equal(gpu.sample(logits, *arguments), reference.sample(logits.float(), *arguments))
    off = [arguments[0], torch.zeros(7), torch.zeros(7, dtype=torch.int64), torch.ones(7), *arguments[4:]]
    expected = reference.sample(logits.float(), *off)
    assert torch.equal(gpu.sample(logits, *off, filtered=False), expected)
    assert torch.equal(gpu.first_argmax(logits), reference.first_argmax(logits.float()))


def test_sample_counts_flags_and_reuses_its_workspace() -> None:
    width = 5000
    logits, arguments = make_logits(4, width, 8), draw_arguments(4, 8)
    logits[1, 4999] = float("nan")
    logits[2] = -INF
    space = make_sampling_workspace(6, width, torch.device("cpu"))
    slots, counts = torch.tensor([2, 0, -1, 1]), torch.zeros(3, width, dtype=torch.int32)
    flags, out = torch.full((4,), 77, dtype=torch.int32), torch.full((4,), -5)
    keywords: dict[str, Any] = {"slots": slots, "output_counts": counts, "workspace": space}
    for _ in range(2):
        gpu.sample(logits, *arguments, **keywords, flags=flags, out=out)
    assert flags.tolist() == [0, NAN_ROW, EMPTY_ROW, 0]
    assert ((out >= 0) & (out < width)).all()
    assert counts.sum(-1).tolist() == [2, 2, 2]
    assert counts[slots[[0, 1, 3]], out[[0, 1, 3]]].tolist() == [2, 2, 2]
    healthy = [0, 3]
    expected = reference.sample(logits[healthy], *[argument[healthy] for argument in arguments])
    assert torch.equal(out[healthy], expected)
    assert not space.done.any()
    with pytest.raises(ValueError, match="together"):
        gpu.sample(logits, *arguments, slots=slots)


def test_a_row_draws_the_same_in_any_crowd() -> None:
    logits, arguments = make_logits(5, 300, 9), draw_arguments(5, 9)
    together = gpu.sample(logits, *arguments)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(gpu.sample(logits[order], *[a[order] for a in arguments]), together[order])
    assert gpu.sample(logits[:0], *[a[:0] for a in arguments]).shape == (0,)


@pytest.mark.parametrize("width", [20, 8192, 8193])
@pytest.mark.parametrize("top", [0, 1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(width: int, top: int, dtype: torch.dtype) -> None:
    logits = make_logits(2, width, top, ties=True).to(dtype)
    logits[1, 10:] = -INF
    chosen = torch.tensor([width - 1, 3])
    space = make_logprobs_workspace(3, width, torch.device("cpu"))
    for _ in range(2):
        picked, ids, values = gpu.token_logprobs(logits, chosen, top, workspace=space)
    expected_picked, expected_ids, expected_values = reference.token_logprobs(logits, chosen, top)
    assert relative_error(picked, expected_picked) < 1e-5
    assert torch.equal(ids, expected_ids)
    assert relative_error(values, expected_values) < 1e-5


def test_logprobs_of_a_sick_row_stay_inside_the_vocabulary() -> None:
    logits = make_logits(2, 40, 1)
    logits[0, :35] = float("nan")
    picked, ids, _ = gpu.token_logprobs(logits, torch.tensor([1, 2]), 20)
    assert torch.isnan(picked[0])
    assert torch.isfinite(picked[1])
    assert ((ids >= 0) & (ids < 40)).all()
    with pytest.raises(ValueError, match="from 0 to 20"):
        gpu.token_logprobs(logits, torch.tensor([1, 2]), 21)

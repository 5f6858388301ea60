"""Kernels of layers that carry a state on the CPU against their twins in torch, on every instruction set here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import recurrent as reference
from tokenmill.kernels.cpu import library
from tokenmill.kernels.cpu.isa import supported
from tokenmill.kernels.cpu.recurrent import PackedConv, PackedNorm, PackedRule, gate_mul
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rows, Rule

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.01}
TYPES = list(TOLERANCE)
STATES = 6


@pytest.fixture(autouse=True, params=[isa.name for isa in supported()])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = next(isa for isa in supported() if isa.name == request.param)
    with library.using(chosen):
        yield


def rows_of(*sequences: tuple[int, int, int]) -> Rows:
    """Of (line, tokens before, tokens now) each."""
    counts = [now for _, _, now in sequences]
    return (
        torch.tensor([line for line, _, _ in sequences]),
        torch.tensor([before + now for _, before, now in sequences], dtype=torch.int32),
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
    )


MIXED = rows_of((3, 9, 1), (0, 0, 1), (5, 0, 7), (1, 4, 12), (2, 6, 0))
"""A decode, a prompt of one token, one of several, a later piece of one, and nothing."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.dtype == wanted.dtype
    assert torch.isfinite(found).all()
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < tolerance


def rule_of(keys: int, heads: int, size: int, values: int, *, delta: bool, skip: bool = False) -> Rule:
    return Rule(
        keys,
        heads,
        size,
        values,
        rate=-random(heads, seed=1).exp(),
        step_bias=random(heads, seed=2),
        delta=delta,
        strength=2.0 if delta and values > 64 else 1.0,
        skip=random(heads, seed=3) if skip else None,
        least=0.0 if delta else 0.05,
    )


CONVS = [
    (24, 4, "silu", False, False),
    (300, 3, None, True, False),
    (33, 2, "silu", True, False),
    (40, 3, None, False, True),
    (272, 4, None, True, True),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("channels", "taps", "activation", "biased", "gated"), CONVS)
def test_causal_conv(
    channels: int, taps: int, activation: str | None, biased: bool, gated: bool, dtype: torch.dtype
) -> None:
    bias = random(channels, dtype=dtype, seed=4) if biased else None
    conv = Conv(random(channels, taps, dtype=dtype), bias, activation, gated)
    x = random(21, 3 * channels + (0 if gated else 5), dtype=dtype)
    state, twin = (random(STATES, taps - 1, channels, dtype=dtype, seed=5) for _ in range(2))
    found = PackedConv(conv)(x, state, MIXED)
    close(found, reference.causal_conv(x, conv, twin, MIXED), TOLERANCE[dtype])
    assert torch.equal(state, twin) or (gated and dtype == torch.float32)
    close(state, twin, 1e-6)


RULES = [
    rule_of(2, 4, 16, 16, delta=True),
    rule_of(2, 2, 24, 40, delta=True),
    rule_of(1, 3, 128, 128, delta=True),
    rule_of(1, 4, 16, 8, delta=False, skip=True),
    rule_of(2, 4, 128, 64, delta=False, skip=True),
    rule_of(3, 3, 64, 100, delta=False),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", RULES)
def test_recur(rule: Rule, dtype: torch.dtype) -> None:
    x = random(21, rule.width, dtype=dtype)
    gates = random(21, rule.heads * (2 if rule.delta else 1))
    shape = (STATES, rule.heads, rule.key_size, rule.value_size)
    state, twin = (random(*shape, seed=6) for _ in range(2))
    found = PackedRule(rule)(x, gates, state, MIXED)
    close(found, reference.recur(x, gates, rule, twin, MIXED), TOLERANCE[dtype])
    close(state, twin, 2e-5)
    untouched = random(*shape, seed=6)
    assert torch.equal(state[[2, 4]], untouched[[2, 4]])


@pytest.mark.parametrize("dtype", TYPES)
def test_steps_make_no_difference(dtype: torch.dtype) -> None:
    """One step of 14 tokens, pieces of it, or single ones beside others: the same bits."""
    rule, conv = RULES[1], Conv(random(32, 4, dtype=dtype), None, "silu")
    x, gates = random(14, rule.width, dtype=dtype), random(14, 2 * rule.heads)
    inputs = random(14, 32, dtype=dtype)
    packed, packed_conv = PackedRule(rule), PackedConv(conv)
    wanted = None
    for steps in ([14], [1, 6, 7], [13, 1], [1] * 14):
        state = torch.full((STATES, rule.heads, rule.key_size, rule.value_size), float("nan"))
        past = torch.full((STATES, 3, 32), float("nan"), dtype=dtype)
        parts, done = [], 0
        for count in steps:
            now = slice(done, done + count)
            mixed = [
                packed(torch.cat([x[now], x[:2]]), torch.cat([gates[now], gates[:2]]), state, rows)
                for rows in (rows_of((4, done, count), (1, 0, 2)),)
            ]
            convolved = packed_conv(inputs[now].contiguous(), past, rows_of((4, done, count)))
            parts.append((mixed[0][:count], convolved))
            done += count
        found = [torch.cat(x) for x in zip(*parts, strict=True)]
        if wanted is None:
            wanted = found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("width", "size", "weights"), [(96, 32, 32), (96, 96, 96), (80, 40, 80), (21, 7, 7)])
def test_gated_norm(width: int, size: int, weights: int, gate_first: bool, dtype: torch.dtype) -> None:
    norm = GatedNorm(random(weights, dtype=dtype), 1e-5, size, gate_first)
    x, gate = random(5, width, dtype=dtype), random(5, width + 11, dtype=dtype)
    close(PackedNorm(norm)(x, gate), reference.gated_norm(x, gate, norm), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TYPES)
def test_gate_mul(dtype: torch.dtype) -> None:
    x, gate = random(3, 77, dtype=dtype), 4 * random(3, 77, dtype=dtype, seed=9)
    close(gate_mul(x, gate), reference.gate_mul(x, gate), TOLERANCE[dtype])


def test_what_does_not_fit_is_refused() -> None:
    conv, rule = PackedConv(Conv(random(8, 3))), PackedRule(RULES[0])
    state = random(STATES, rule._sizes[0], 16, 16)
    with pytest.raises(ValueError, match="lines must be of 6 states"):
        conv(random(1, 8), random(STATES, 2, 8), rows_of((6, 0, 1)))
    with pytest.raises(ValueError, match="don't hold 8 channels"):
        conv(random(1, 7), random(STATES, 2, 8), rows_of((0, 0, 1)))
    with pytest.raises(ValueError, match="state"):
        rule(random(1, rule.width), random(1, rule.gates), state[:, 1:].contiguous(), rows_of((0, 0, 1)))
    with pytest.raises(ValueError, match="taps"):
        PackedConv(Conv(random(8, 9)))
    with pytest.raises(ValueError, match="parts of 5"):
        PackedNorm(GatedNorm(random(5), 1e-5, 5))(random(2, 12), random(2, 12))

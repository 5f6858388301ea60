"""A GPU's kernels of layers that carry a state, in Triton's interpreter, beside plain torch."""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, recurrent
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rows, Rule

# exp saturates to infinity where the functions are flat; numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
MIXED = ((1, 7), (5, 5), (1, 1), (2, 2), (9, 30), (0, 4), (2, 3), (3, 3))
"""Tokens in the step and in all of each sequence: continued and fresh ones, and one that sits the step out."""


def batch(counts: tuple[tuple[int, int], ...], states: int) -> Rows:
    """Sequences in lines of their own, which are in no order."""
    lines = torch.arange(states - 1, -1, -1)[: len(counts)]
    seq_lens = torch.tensor([length for _, length in counts], dtype=torch.int32)
    starts = torch.tensor([0, *(count for count, _ in counts)], dtype=torch.int32).cumsum(0)
    return lines, seq_lens, starts.to(torch.int32)


def spoil_fresh(state: Tensor, rows: Rows) -> None:
    """NaN where a sequence that begins mustn't look."""
    lines, seq_lens, starts = rows
    state[lines[seq_lens == starts.diff()]] = torch.nan


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 5e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=False)


def conv_of(channels: int, taps: int, bias: bool, activation: str | None, gated: bool) -> Conv:
    return Conv(torch.randn(channels, taps), torch.randn(channels) if bias else None, activation, gated)


def transposed(conv: Conv) -> Conv:
    return dataclasses.replace(conv, weight=conv.weight.T.contiguous())


@pytest.mark.parametrize(
    ("channels", "taps", "bias", "activation", "gated", "dtype"),
    [
        (24, 4, False, "silu", False, torch.float32),
        (515, 4, True, "silu", False, torch.bfloat16),
        (40, 3, False, None, True, torch.bfloat16),
        (16, 3, True, None, True, torch.float16),
        (9, 2, True, "silu", False, torch.float32),
    ],
)
def test_convolutions(
    channels: int, taps: int, bias: bool, activation: str | None, gated: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(channels)
    conv, rows = conv_of(channels, taps, bias, activation, gated), batch(MIXED, 9)
    x = torch.randn(int(rows[2][-1]), 3 * channels + 5).to(dtype)
    state = torch.randn(9, taps - 1, channels).to(dtype)
    spoil_fresh(state, rows)
    before, others = state.clone(), state.clone()
    expected = recurrent.causal_conv(x, conv, state, rows)
    found = gpu.causal_conv(x, transposed(conv), others, rows)
    close(found, expected)
    untouched = torch.ones(9, dtype=torch.bool).scatter(0, rows[0], False)
    assert torch.equal(others[untouched], before[untouched])
    sat_out = rows[0][5]
    assert torch.equal(others[sat_out], before[sat_out])
    close(others[rows[0]], state[rows[0]])


def rule_of(groups: int, heads: int, keys: int, values: int, *, delta: bool, skip: bool = False) -> Rule:
    return Rule(
        groups, heads, keys, values, -torch.rand(heads), torch.randn(heads), delta,
        strength=2.0 if delta else 1.0, skip=torch.randn(heads) if skip else None, least=0.0 if delta else 0.3,
    )  # fmt: skip


RULES = [
    (2, 4, 16, 8, True, False),
    (3, 3, 24, 40, True, False),
    (1, 4, 16, 16, False, True),
    (2, 2, 12, 20, False, False),
    (1, 1, 256, 24, True, False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "heads", "keys", "values", "delta", "skip"), RULES)
def test_recurrences(
    groups: int, heads: int, keys: int, values: int, delta: bool, skip: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(keys)
    rule, rows = rule_of(groups, heads, keys, values, delta=delta, skip=skip), batch(MIXED, 9)
    tokens = int(rows[2][-1])
    x = torch.randn(tokens, rule.width).to(dtype)
    gates = 4 * torch.randn(tokens, (2 if delta else 1) * heads)
    state = torch.randn(9, heads, keys, values)
    spoil_fresh(state, rows)
    others = state.clone()
    expected = recurrent.recur(x, gates, rule, state, rows)
    found = gpu.recur(x, gates, rule, others, rows)
    close(found, expected)
    close(others, state)


@pytest.mark.parametrize("pieces", [(1,) * 7, (2, 5), (3, 1, 3), (6, 1)])
def test_pieces_of_a_prompt_are_the_prompt(pieces: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv, rule = transposed(conv_of(48, 4, True, "silu", False)), rule_of(1, 2, 8, 16, delta=True)
    x, gates = torch.randn(7, 60), torch.randn(7, 4)
    whole = torch.full((1, 3, 48), torch.nan), torch.full((1, 2, 8, 16), torch.nan)
    split = whole[0].clone(), whole[1].clone()

    def step(first: int, last: int, states: tuple[Tensor, Tensor]) -> Tensor:
        rows = batch(((last - first, last),), 1)
        mixed = gpu.causal_conv(x[first:last], conv, states[0], rows)
        return gpu.recur(mixed, gates[first:last], rule, states[1], rows)

    expected = step(0, 7, whole)
    ends = torch.tensor(pieces).cumsum(0).tolist()
    found = torch.cat([step(end - count, end, split) for count, end in zip(pieces, ends, strict=True)])
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))


@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize(("parts", "size", "whole"), [(4, 16, False), (3, 24, True), (1, 1500, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_norms(parts: int, size: int, whole: bool, gate_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    x, gate = torch.randn(5, parts * size).to(dtype), torch.randn(5, parts * size + 11).to(dtype)
    norm = GatedNorm(torch.randn(parts * size if whole else size).to(dtype), 1e-5, size, gate_first)
    close(gpu.gated_norm(x, gate, norm), recurrent.gated_norm(x, gate, norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(3, 1100).to(dtype), torch.randn(3, 1100).to(dtype)
    close(gpu.gate_mul(x, gate), recurrent.gate_mul(x, gate))


def test_states_are_copied() -> None:
    state = torch.randn(6, 3, 5, 90)
    expected, pairs = state.clone(), (torch.tensor([4, 0, 0]), torch.tensor([1, 2, 5]))
    recurrent.copy_states(expected, *pairs)
    gpu.copy_states(state, *pairs)
    assert torch.equal(state, expected)

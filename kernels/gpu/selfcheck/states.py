"""Layers that carry a state: sequences that begin, go on for one token or many, or sit a step out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tokenmill.kernels import gpu, recurrent
from tokenmill.kernels.gpu.cases import relative_error
from tokenmill.kernels.gpu.selfcheck.trial import TOLERANCE, CheckResult, Trial, differing, label
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rows, Rule

_TOKENS, _LENGTHS = (1, 5, 1, 2, 37, 0, 3), (7, 5, 1, 4, 60, 4, 3)
_LINES = len(_TOKENS) + 2


def states(trial: Trial) -> Iterator[CheckResult]:
    """Convolutions and recurrences with what they leave behind, and the norms and gates after them."""
    rows = _rows(trial.device)
    for dtype in trial.dtypes:
        for conv in (
            Conv(trial.randn(600, 4), None, "silu"),
            Conv(trial.randn(72, 4), trial.randn(72), "silu"),
            Conv(trial.randn(72, 3), None, None, gated=True),
        ):
            yield from _conv(trial, conv, rows, dtype)
        for rule in _rules(trial)[trial.shapes]:
            yield from _recurrence(trial, rule, rows, dtype)
        yield from _elementwise(trial, dtype)
    state, pairs = trial.randn(6, 3, 500), (torch.tensor([4, 0, 0]), torch.tensor([1, 2, 5]))
    expected = state.clone()
    recurrent.copy_states(expected, *(part.to(trial.device) for part in pairs))
    gpu.copy_states(state, *(part.to(trial.device) for part in pairs))
    yield CheckResult("copy_states", differing(state, expected), 0.0)


def _rows(device: torch.device) -> Rows:
    lines = torch.arange(_LINES - 1, _LINES - 1 - len(_TOKENS), -1)
    lengths = torch.tensor(_LENGTHS, dtype=torch.int32)
    starts = torch.tensor([0, *_TOKENS]).cumsum(0).int()
    return lines.to(device), lengths.to(device), starts.to(device)


def _spoilt(state: Tensor, rows: Rows) -> Tensor:
    """NaN is what a sequence that begins finds."""
    lines, lengths, starts = rows
    state[lines[lengths == starts.diff()]] = torch.nan
    return state


def _rules(trial: Trial) -> list[Rule]:
    def rule(groups: int, heads: int, keys: int, values: int, delta: bool) -> Rule:
        rate, bias, skip = -trial.rand(heads), trial.randn(heads), None if delta else trial.randn(heads)
        return Rule(groups, heads, keys, values, rate, bias, delta, skip=skip, least=0.0 if delta else 0.1)

    return [
        rule(2, 4, 128, 128, True),
        rule(1, 3, 24, 40, True),
        rule(1, 4, 128, 64, False),
        rule(2, 2, 256, 64, True),
    ]


def _conv(trial: Trial, conv: Conv, rows: Rows, dtype: torch.dtype) -> Iterator[CheckResult]:
    channels, taps = conv.weight.shape
    x = trial.randn(sum(_TOKENS), 3 * channels, dtype=dtype)
    state = _spoilt(trial.randn(_LINES, taps - 1, channels, dtype=dtype), rows)
    ours = state.clone()
    expected = recurrent.causal_conv(x, conv, state, rows)
    out = gpu.causal_conv(x, replace(conv, weight=conv.weight.T.contiguous()), ours, rows)
    detail = f"{channels} channels, {taps} taps{', gated' if conv.gated else ''}"
    error = max(relative_error(out, expected), relative_error(ours, state))
    yield CheckResult(label("causal_conv", dtype, detail), error, TOLERANCE[dtype])


def _recurrence(trial: Trial, rule: Rule, rows: Rows, dtype: torch.dtype) -> Iterator[CheckResult]:
    x = trial.randn(sum(_TOKENS), rule.width, dtype=dtype)
    gates = trial.randn(sum(_TOKENS), (2 if rule.delta else 1) * rule.heads) * 3
    state = _spoilt(trial.randn(_LINES, rule.heads, rule.key_size, rule.value_size), rows)
    ours = state.clone()
    expected = recurrent.recur(x, gates, rule, state, rows)
    out = gpu.recur(x, gates, rule, ours, rows)
    detail = f"{rule.heads} heads, {rule.key_size} x {rule.value_size}{', delta rule' if rule.delta else ''}"
    yield CheckResult(label("recur", dtype, detail), relative_error(out, expected), TOLERANCE[dtype])
    yield CheckResult(label("recur, states", dtype, detail), relative_error(ours, state), 1e-4)


def _elementwise(trial: Trial, dtype: torch.dtype) -> Iterator[CheckResult]:
    width = 8 * (trial.width // 8)
    x, gate = (trial.randn(trial.rows, columns, dtype=dtype) for columns in (width, width + 5))
    for gate_first in (False, True):
        for size, weights in ((width // 8, width // 8), (width // 8, width), (width, width)):
            norm = GatedNorm(trial.randn(weights, dtype=dtype), 1e-5, size, gate_first)
            error = relative_error(gpu.gated_norm(x, gate, norm), recurrent.gated_norm(x, gate, norm))
            detail = f"{width} by {size}{', gate first' if gate_first else ''}"
            yield CheckResult(label("gated_norm", dtype, detail), error, TOLERANCE[dtype])
    gate = gate[:, :width].contiguous()
    error = relative_error(gpu.gate_mul(x, gate), recurrent.gate_mul(x, gate))
    yield CheckResult(label("gate_mul", dtype), error, TOLERANCE[dtype])

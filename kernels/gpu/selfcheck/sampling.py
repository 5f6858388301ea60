"""From logits to tokens: bias, penalties, masks, log-probabilities, filters and draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.selfcheck.trial import CheckResult, Trial, differing

DRAW_TOLERANCE = 0.02
"""Allowed share of tokens or rows that differ where a last bit of exp or log decides (thresholds, draws)."""


def adjusted_logits(trial: Trial) -> Iterator[CheckResult]:
    """Bias, penalties and masks in one pass, and log-probabilities beside them."""
    rows, width = trial.rows, trial.vocabulary
    raw = trial.randn(rows, width) * 3
    penalties = gpu.Penalties(
        torch.arange(rows, device=trial.device) - 1,
        trial.randint(-2, 3, rows, width).clamp(min=0).int(),
        trial.rand(rows, width) < 0.3,
        trial.rand(rows) + 0.5,
        trial.randn(rows),
        trial.randn(rows),
    )
    mask = gpu.Mask(
        torch.arange(rows, device=trial.device) % 3 - 1,
        trial.randint(-(1 << 31), 1 << 31, 2, -(-width // 32)).int(),
    )
    everyone = torch.arange(rows, device=trial.device)
    bias = gpu.Bias(everyone, trial.randint(0, width, rows), trial.randn(rows))
    out = poisoned(rows, width, dtype=torch.float32, device=trial.device)
    gpu.adjust_logits(raw, bias=bias, penalties=penalties, mask=mask, out=out)
    expected = raw.clone()
    reference.apply_logit_bias(expected, bias.rows, bias.tokens, bias.values)
    reference.apply_penalties(
        expected, penalties.slots, penalties.output_counts, penalties.prompt_seen,
        penalties.repetition, penalties.presence, penalties.frequency,
    )  # fmt: skip
    masked = mask.lines >= 0
    reference.apply_bitmask(expected, everyone[masked], mask.bits[mask.lines[masked]])
    yield CheckResult("adjust_logits", relative_error(out, expected), 1e-6)
    chosen = trial.randint(0, width, rows)
    got = gpu.token_logprobs(raw, chosen, 20)
    wanted = reference.token_logprobs(raw, chosen, 20)
    yield CheckResult("token_logprobs", max(relative_error(got[i], wanted[i]) for i in (0, 2)), 1e-5)
    yield CheckResult("token_logprobs, ids", differing(got[1], wanted[1]), 0.0)


def draws(trial: Trial) -> Iterator[CheckResult]:
    """Filters, Gumbel draws and argmax, on rows with and without ties."""
    rows, width = trial.rows, trial.vocabulary
    high = 1 << 62
    for name, logits in (
        ("smooth", trial.randn(rows, width) * 3),
        ("ties", (trial.randn(rows, width) * 6).round() / 2),
        ("flat", trial.randn(rows, width) * 0.01),
    ):
        temperature = trial.rand(rows) + 0.3
        temperature[0] = 0.0
        settings = [
            trial.rand(rows) * 0.05 * (trial.randint(0, 2, rows) > 0),
            trial.randint(0, 3, rows) * trial.randint(1, 100, rows),
            1.0 - trial.rand(rows) * 0.5 * (trial.randint(0, 2, rows) > 0),
        ]
        scaled = logits / temperature.clamp(min=0.1)[:, None]
        kept = gpu.filter_logits(scaled, *settings) > float("-inf")
        wanted = reference.filter_logits(scaled, *settings) > float("-inf")
        yield CheckResult(f"filters, {name}", _near_sets(kept, wanted), DRAW_TOLERANCE)
        noise = [trial.randint(-high, high, rows), trial.randint(0, 1 << 17, rows)]
        drawn = gpu.sample(logits, temperature, *settings, *noise)
        expected = reference.sample(logits, temperature, *settings, *noise)
        different = differing(drawn[:, None], expected[:, None])
        yield CheckResult(f"sample, {name}", different, DRAW_TOLERANCE)
        greedy = gpu.first_argmax(logits)
        expected = reference.first_argmax(logits)
        yield CheckResult(f"first_argmax, {name}", differing(greedy[:, None], expected[:, None]), 0.0)


def _near_sets(kept: Tensor, wanted: Tensor) -> float:
    """Tokens in one set only, in parts of those kept; each row's border may go either way."""
    apart = (kept != wanted).sum(1) - 1
    return float(apart.clamp(min=0).sum()) / max(1.0, float(wanted.sum()))

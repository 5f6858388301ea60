"""From logits to tokens, in the order that the API promises:

    raw logits ──▶ log-probabilities
        └ bias → repetition → presence, frequency → min_tokens, grammar → temperature → min_p → top_k → top_p → Gumbel-max

Each stage runs only when some row of the step wants it. The noise is a pure function of (seed, position, token
id), so a row's draw depends on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.input_batch import InputBatch, StepInputs
from tokenmill.engine.request import Sequence

BAN = -100.0
"""A bias of this much or less bans a token whatever its logit."""


class SamplingKernels(Protocol):
    """The kernels that sampling needs; `kernels/reference.py` documents them."""

    apply_logit_bias: Callable[..., None]
    apply_penalties: Callable[..., None]
    apply_bitmask: Callable[..., None]
    sample: Callable[..., Tensor]
    token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of `chosen` rows [n] and, [n, k], of their likeliest tokens."""

    values: Tensor
    top_ids: Tensor
    top_values: Tensor


@dataclass(slots=True)
class Sampled:
    """What a step drew, on the device: N sampler rows.

    `bad` marks rows without a finite largest logit (NaN, or everything masked): their token means nothing.
    `logprobs` covers the rows listed in `logprob_rows`, in that order.
    """

    tokens: Tensor  # [N] int64
    bad: Tensor  # [N] bool
    logprob_rows: list[int]
    logprobs: Logprobs | None
    prompt: Logprobs | None  # the scored prompt rows


class Sampler:
    """Holds what outlives a step: each slot's counts for penalties, its bias, its last token."""

    def __init__(self, kernels: SamplingKernels, batch: InputBatch, width: int, eos_ids: tuple[int, ...]) -> None:
        """`width`: of the logits. `eos_ids` are held back, with a request's stop ids, until its min_tokens."""
        self._kernels = kernels
        self._batch = batch
        self._width = width
        self._eos_ids = eos_ids
        self._device = batch.device
        slots = len(batch.seed)
        self.last_tokens = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._counts: Tensor | None = None  # [slots, V] int32, made when the first penalty asks for it
        self._prompt_seen: Tensor | None = None  # [slots, V] bool
        self._bias: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    def start(self, sequence: Sequence) -> None:
        """Set up the slot of a sequence that starts, or starts again after a preemption."""
        self._bias.pop(sequence.slot, None)
        bias = sequence.params.logit_bias
        if bias:
            values = np.array([v if v > BAN else -np.inf for v in bias.values()], np.float32)
            self._bias[sequence.slot] = (np.array(list(bias), np.int64), values)
        if sequence.params.penalized:
            self._count(sequence)

    def _count(self, sequence: Sequence) -> None:
        if self._counts is None or self._prompt_seen is None:
            shape = (len(self._batch.seed), self._width)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        output = torch.tensor(sequence.output, dtype=torch.int64, device=self._device)
        prompt = torch.tensor(sequence.prompt, dtype=torch.int64, device=self._device)
        self._counts[sequence.slot] = torch.bincount(output, minlength=self._width).int()
        self._prompt_seen[sequence.slot] = False
        self._prompt_seen[sequence.slot, prompt] = True

    def sample(self, logits: Tensor, inputs: StepInputs) -> Sampled:
        """Draw one token for each sampler; logits [S + N, V] in the model's dtype, scored prompt rows first."""
        scored = len(inputs.targets)
        prompt = self._score(logits[:scored], inputs.targets, _most_alternatives(inputs)) if scored else None
        raw = logits[scored:]
        work = self._adjust(raw, inputs)
        tokens = self._draw(work, inputs)
        bad = ~torch.isfinite(work.amax(-1)) if len(work) else torch.zeros(0, dtype=torch.bool)
        rows = [i for i, row in enumerate(inputs.samplers) if row.sequence.params.scored]
        logprobs = None
        if rows:
            top = max(inputs.samplers[i].sequence.params.logprobs or 0 for i in rows)
            index = torch.tensor(rows, device=self._device)
            logprobs = self._score(raw[index], tokens[index], top)
        self._remember(tokens, inputs)
        return Sampled(tokens, bad, rows, logprobs, prompt)

    def _score(self, logits: Tensor, chosen: Tensor, top: int) -> Logprobs:
        return Logprobs(*self._kernels.token_logprobs(logits, chosen, top))

    def _adjust(self, raw: Tensor, inputs: StepInputs) -> Tensor:
        """Float32 logits [N, V] after bias, penalties and min_tokens; `raw` stays as it is."""
        bias = self._bias_entries(inputs)
        held_back = self._held_back(inputs)
        penalized = self._batch.penalized[inputs.rows]
        changes = bias is not None or held_back is not None or inputs.constrained or bool(penalized.any())
        work = raw.clone() if changes and raw.dtype is torch.float32 else raw.float()
        if bias is not None:
            self._kernels.apply_logit_bias(work, *bias)
        if penalized.any():
            self._penalize(work, inputs, penalized)
        if held_back is not None:
            self._kernels.apply_logit_bias(work, *held_back)
        if inputs.constrained:
            self._kernels.apply_bitmask(work, *self._grammar_masks(inputs))
        return work

    def _grammar_masks(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Rows under a grammar and, [n, words] int32, the tokens that it allows there."""
        rows = [i for i, row in enumerate(inputs.samplers) if row.sequence.matcher is not None]
        masks = np.zeros((len(rows), -(-self._width // 32)), np.int32)
        for line, i in enumerate(rows):
            row = inputs.samplers[i]
            if row.after or row.sequence.matcher is None:
                continue
            drafts = inputs.samplers[i + row.drafts].after
            row.sequence.matcher.fill(masks[line : line + row.drafts + 1], drafts)
        return self._put(np.array(rows, np.int64)), self._put(masks)

    def _penalize(self, work: Tensor, inputs: StepInputs, penalized: NDArray[np.bool_]) -> None:
        assert self._counts is not None
        assert self._prompt_seen is not None
        drafted = [i for i, row in enumerate(inputs.samplers) if row.after and penalized[i]]
        lines = np.where(penalized, inputs.rows, -1)
        lines[drafted] = -1
        settings = [
            self._put(values[inputs.rows])
            for values in (self._batch.repetition, self._batch.presence, self._batch.frequency)
        ]
        self._kernels.apply_penalties(work, self._put(lines), self._counts, self._prompt_seen, *settings)
        if drafted:
            slots = self._put(inputs.rows[drafted])
            counts = self._counts[slots]
            for line, i in enumerate(drafted):
                after = torch.tensor(inputs.samplers[i].after, device=self._device)
                counts[line] += torch.bincount(after, minlength=self._width).int()
            lines[:] = -1
            lines[drafted] = np.arange(len(drafted))
            self._kernels.apply_penalties(
                work, self._put(lines), counts, self._prompt_seen[slots], *settings
            )

    def _draw(self, work: Tensor, inputs: StepInputs) -> Tensor:
        batch, rows = self._batch, inputs.rows
        return self._kernels.sample(
            work,
            self._put(batch.temperature[rows]),
            self._put(batch.min_p[rows]),
            self._put(batch.top_k[rows]),
            self._put(batch.top_p[rows]),
            self._put(batch.seed[rows]),
            inputs.generated,
        )

    def _bias_entries(self, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor] | None:
        found = [(i, *self._bias[slot]) for i, slot in enumerate(inputs.rows.tolist()) if slot in self._bias]
        if not found:
            return None
        rows = np.concatenate([np.full(len(tokens), i, np.int64) for i, tokens, _ in found])
        tokens = np.concatenate([tokens for _, tokens, _ in found])
        values = np.concatenate([values for *_, values in found])
        return self._put(rows), self._put(tokens), self._put(values)

    def _held_back(self, inputs: StepInputs) -> tuple[Tensor, Tensor, Tensor] | None:
        """-inf for the ends of those rows that haven't reached their min_tokens."""
        rows: list[int] = []
        tokens: list[int] = []
        for i, row in enumerate(inputs.samplers):
            params = row.sequence.params
            if row.generated < params.min_tokens:
                ends = {*self._eos_ids, *params.stop_token_ids}
                rows += [i] * len(ends)
                tokens += ends
        if not rows:
            return None
        return (
            self._put(np.array(rows, np.int64)),
            self._put(np.array(tokens, np.int64)),
            self._put(np.full(len(rows), -np.inf, np.float32)),
        )

    def _remember(self, tokens: Tensor, inputs: StepInputs) -> None:
        rows = self._put(inputs.rows)
        self.last_tokens[rows] = tokens
        if self._counts is not None:
            verified = np.array([row.drafts > 0 for row in inputs.samplers], np.bool_)
            counted = self._batch.penalized[inputs.rows] & ~verified
            if counted.any():
                chosen = self._put(np.flatnonzero(counted))
                self._counts[rows[chosen], tokens[chosen]] += 1

    @torch.inference_mode()
    def count(self, slot: int, tokens: list[int]) -> None:
        """Count tokens of a slot that drafts brought, which `sample` leaves until they are verified."""
        if self._counts is not None and self._batch.penalized[slot]:
            new = torch.tensor(tokens, device=self._device)
            self._counts[slot] += torch.bincount(new, minlength=self._width).int()

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _most_alternatives(inputs: StepInputs) -> int:
    return max(part.sequence.params.prompt_logprobs or 0 for part in inputs.scored)

"""From logits to tokens, in the order that the API promises:

    raw logits ──▶ log-probabilities
        └ bias → repetition → presence, frequency → min_tokens, grammar
               → temperature → min_p → top_k → top_p → Gumbel-max

Each stage runs only when some row of the step wants it. The noise is a pure function of (seed, position, token
id), so a row's draw depends on nothing but the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.input_batch import InputBatch, StepInputs
from tokenmill.engine.kernel_set import Adjustments, Entries, Penalties, ReferenceKernels
from tokenmill.engine.request import Sequence

BAN = -100.0
"""A bias of this much or less bans a token whatever its logit."""


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of `chosen` rows [n] and, [n, k], of their likeliest tokens."""

    values: Tensor
    top_ids: Tensor
    top_values: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values, self.top_ids, self.top_values]


@dataclass(slots=True)
class Sampled:
    """What a step drew, on the device: N sampler rows.

    `flags` is not 0 for rows without a finite largest logit (NaN, or everything masked): their token means
    nothing. `logprobs` covers the rows listed in `logprob_rows`, in that order.
    """

    tokens: Tensor  # [N] int64
    flags: Tensor  # [N]
    logprob_rows: list[int]
    logprobs: Logprobs | None
    prompt: Logprobs | None  # the scored prompt rows
    packed: Tensor | None = None  # [2, rows] int64: tokens and flags of a captured step, in one piece


class Sampler:
    """Holds what outlives a step: each slot's counts for penalties, its bias, its last token."""

    def __init__(self, kernels: ReferenceKernels, batch: InputBatch, width: int, eos_ids: list[int]) -> None:
        """`width`: of the logits. `eos_ids` are held back, with a request's stop ids, until its min_tokens."""
        self._kernels = kernels
        self._batch = batch
        self._width = width
        self._eos_ids = eos_ids
        self._device = batch.device
        slots = len(batch.seed)
        self.last_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)
        """The line behind the slots belongs to a captured step's padding."""
        self._counts: Tensor | None = None  # [slots, V] int32, made when the first penalty asks for it
        self._prompt_seen: Tensor | None = None  # [slots, V] bool
        self._bias: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    # ---------------------------------------------------------------- what outlives a step

    def start(self, sequence: Sequence) -> None:
        """Set up the slot of a sequence that starts, or starts again after a preemption."""
        self._bias.pop(sequence.slot, None)
        bias = sequence.params.logit_bias
        if bias:
            values = np.array([v if v > BAN else -np.inf for v in bias.values()], np.float32)
            self._bias[sequence.slot] = (np.array(list(bias), np.int64), values)
        if sequence.params.penalized:
            counts, seen = self.counts()
            (prompt,) = self._put(np.array(sequence.prompt, np.int64))
            counts[sequence.slot].zero_()
            self._add(sequence.slot, sequence.output)
            seen[sequence.slot] = False
            seen[sequence.slot].index_fill_(0, prompt, True)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Tokens generated [slots, V] int32 and tokens of the prompts [slots, V] bool, by slot."""
        if self._counts is None or self._prompt_seen is None:
            shape = (len(self._batch.seed), self._width)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        return self._counts, self._prompt_seen

    @torch.inference_mode()
    def count(self, slot: int, tokens: list[int]) -> None:
        """Count tokens of a slot that drafts brought, which `sample` leaves until they are verified."""
        if self._counts is not None and self._batch.penalized[slot]:
            self._add(slot, tokens)

    def _add(self, slot: int, tokens: list[int]) -> None:
        if tokens:
            (ids,) = self._put(np.array(tokens, np.int64))
            counts, _ = self.counts()
            counts[slot].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    # ---------------------------------------------------------------- a step

    def graph_variant(self, rows: NDArray[np.int64], generated: NDArray[np.int64]) -> str:
        """Which captured sampler these slots can use: plain, full (filters, penalties), or none of them."""
        if self._biased(rows) or self._holds_back(rows, generated):
            return "none"
        return "full" if (self._batch.penalized[rows] | self._batch.filtered[rows]).any() else "plain"

    def _biased(self, rows: NDArray[np.int64]) -> bool:
        return bool(self._bias) and any(slot in self._bias for slot in rows.tolist())

    def sample(self, logits: Tensor, inputs: StepInputs) -> Sampled:
        """Draw one token for each sampler; logits [S + N, V] in the model's dtype, scored prompt rows first."""
        if inputs.plain and not inputs.constrained and not self._biased(inputs.rows):
            tokens, flags = self._kernels.draw(logits, inputs.settings, filtered=False)
            self.last_tokens.index_copy_(0, inputs.lines, tokens)
            return Sampled(tokens, flags, [], None, None)
        scored = len(inputs.targets)
        prompt = None
        if scored:
            top = max(part.sequence.params.prompt_logprobs or 0 for part in inputs.scored)
            prompt = Logprobs(*self._kernels.token_logprobs(logits[:scored], inputs.targets, top))
        raw = logits[scored:]
        work = self._kernels.adjust(raw, self._changes(inputs))
        filtered = bool(self._batch.filtered[inputs.rows].any())
        tokens, flags = self._kernels.draw(
            work, inputs.settings, filtered=filtered, counted=self._counted(inputs)
        )
        self.last_tokens.index_copy_(0, inputs.lines, tokens)
        return self.score(Sampled(tokens, flags, [], None, prompt), raw, inputs)

    def score(self, sampled: Sampled, raw: Tensor, inputs: StepInputs) -> Sampled:
        """Add the log-probabilities that rows of raw logits [N, V] ask for."""
        rows = np.flatnonzero(self._batch.scored[inputs.rows]).tolist()
        if rows:
            top = max(inputs.samplers[i].sequence.params.logprobs or 0 for i in rows)
            chosen = sampled.tokens
            if len(rows) < len(chosen):
                (index,) = self._put(np.array(rows, np.int64))
                raw, chosen = raw[index], chosen[index]
            sampled.logprob_rows = rows
            sampled.logprobs = Logprobs(*self._kernels.token_logprobs(raw, chosen, top))
        return sampled

    def _changes(self, inputs: StepInputs) -> Adjustments:
        penalized = self._batch.penalized[inputs.rows]
        return Adjustments(
            bias=self._bias_entries(inputs),
            penalties=self._penalties(inputs, penalized) if penalized.any() else (),
            mask=self._grammar_masks(inputs) if inputs.constrained else None,
        )

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
        for mask, i in zip(masks, rows, strict=True):
            row = inputs.samplers[i]
            if row.generated < row.sequence.params.min_tokens:
                self._hold_back_in(mask, row.sequence)
        index, bits = self._put(np.array(rows, np.int64), masks)
        return index, bits

    def _hold_back_in(self, mask: NDArray[np.int32], sequence: Sequence) -> None:
        """Take the ends out of a grammar's mask, unless it allows nothing else: then it is complete."""
        held = mask.copy()
        for token in {*self._eos_ids, *sequence.params.stop_token_ids}:
            held[token // 32] &= ~np.int32(np.uint32(1 << (token % 32)).view(np.int32))
        if held.any():
            mask[:] = held

    def _penalties(self, inputs: StepInputs, penalized: NDArray[np.bool_]) -> tuple[Penalties, ...]:
        """Rows by their slots' counts, and those behind drafts by counts of their own that include the drafts."""
        batch, (counts, seen) = self._batch, self.counts()
        drafted = np.array([bool(row.after) for row in inputs.samplers], np.bool_) & penalized
        lines = np.where(penalized & ~drafted, inputs.rows, -1)
        own = np.full_like(lines, -1)
        own[drafted] = np.arange(np.count_nonzero(drafted))
        chosen = np.flatnonzero(drafted)
        after = [
            (line, token) for line, i in enumerate(chosen.tolist()) for token in inputs.samplers[i].after
        ]
        settings = [values[inputs.rows] for values in (batch.repetition, batch.presence, batch.frequency)]
        put = self._put(lines, *settings, own, inputs.rows[drafted], np.array(after, np.int64).reshape(-1, 2))
        first = Penalties(put[0], counts, seen, put[1], put[2], put[3])
        if not after:
            return (first,)
        slots, pairs = put[5], put[6]
        with_drafts = counts[slots]
        ones = torch.ones_like(pairs[:, 0], dtype=torch.int32)
        with_drafts.index_put_((pairs[:, 0], pairs[:, 1]), ones, accumulate=True)
        return first, Penalties(put[4], with_drafts, seen[slots], put[1], put[2], put[3])

    def _counted(self, inputs: StepInputs) -> tuple[Tensor, Tensor] | None:
        """In which lines of the counts the tokens of this step go; drafts are counted once they are verified."""
        counted = self._batch.penalized[inputs.rows]
        if self._counts is None or not counted.any():
            return None
        verified = np.array([row.drafts > 0 for row in inputs.samplers], np.bool_)
        (lines,) = self._put(np.where(counted & ~verified, inputs.rows, -1))
        return lines, self._counts

    def _bias_entries(self, inputs: StepInputs) -> Entries | None:
        """What is added before penalties: the requests' bias, and -inf for ends before min_tokens."""
        found = [
            (i, *self._bias[slot])
            for i, slot in enumerate(inputs.rows.tolist() if self._bias else ())
            if slot in self._bias
        ]
        held_back = self._held_back(inputs)
        if not found and not held_back:
            return None
        rows = [np.full(len(tokens), i, np.int64) for i, tokens, _ in found]
        ids = [tokens for _, tokens, _ in found]
        values = [values for *_, values in found]
        for i, ends in held_back.items():
            for line, (row, tokens, given) in enumerate(found):
                if row == i:  # an entry may stand there once
                    keep = ~np.isin(tokens, ends)
                    rows[line], ids[line], values[line] = rows[line][keep], tokens[keep], given[keep]
            rows.append(np.full(len(ends), i, np.int64))
            ids.append(np.array(ends, np.int64))
            values.append(np.full(len(ends), -np.inf, np.float32))
        put = self._put(np.concatenate(rows), np.concatenate(ids), np.concatenate(values))
        return put[0], put[1], put[2]

    def _holds_back(self, rows: NDArray[np.int64], generated: NDArray[np.int64]) -> bool:
        """Whether some of these slots haven't reached their min_tokens."""
        return bool((generated < self._batch.min_tokens[rows]).any())

    def _held_back(self, inputs: StepInputs) -> dict[int, list[int]]:
        """The ends of those rows that haven't reached their min_tokens."""
        if not self._holds_back(inputs.rows, inputs.generated):
            return {}
        return {
            i: sorted({*self._eos_ids, *row.sequence.params.stop_token_ids})
            for i, row in enumerate(inputs.samplers)
            if row.generated < row.sequence.params.min_tokens and row.sequence.matcher is None
        }

    def _put(self, *arrays: NDArray[Any]) -> list[Tensor]:
        return self._batch.staging.put(arrays)

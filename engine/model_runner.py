"""The only forward pass: one step's tokens through the model, then the sampler.

launch(step)   prepare inputs ─▶ forward ─▶ logits of the rows that need them ─▶ sample      (asynchronous on a GPU)
collect(run)   wait, and read what was drawn
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.forward import Forward, build_forward
from tokenmill.engine.input_batch import InputBatch, ScoredPart, StepInputs
from tokenmill.engine.kernel_set import select_kernels
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import PromptLogprobs, TopLogprobs
from tokenmill.engine.request import Sequence
from tokenmill.engine.sampler import Logprobs, Sampled, Sampler
from tokenmill.engine.scheduler import Step

SCORE_BYTES = 1 << 28
"""Float32 logits of scored prompt positions held at once."""


@dataclass(slots=True)
class Run:
    """A launched step: its schedule, its inputs, and its results on the device."""

    step: Step
    inputs: StepInputs
    logits: Tensor
    sampled: Sampled | None = None


@dataclass(slots=True)
class Draw:
    """One token that was drawn from a row of logits."""

    token: int
    bad: bool
    logprob: float | None
    top: TopLogprobs | None


@dataclass(slots=True)
class Result:
    """What a step brought, on the host: a draw for each of `StepInputs.samplers`, and prompt scores."""

    draws: list[Draw]
    scores: list[tuple[Sequence, PromptLogprobs]]


class ModelRunner:
    """Owns the model's forward pass and the persistent rows."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.device = model.device
        self.kernels = select_kernels(model.device, model.dtype)
        self.phases: dict[str, float] = defaultdict(float)
        self.forward: Forward = build_forward(model, config, self.kernels)
        self.max_context = min(model.max_context, self.forward.capacity.tokens)
        blocks = -(-self.max_context // config.block_size)
        self.batch = InputBatch(config.max_batch, blocks, config.block_size, model.device)
        self.sampler = Sampler(self.kernels, self.batch, model.logits_width, model.eos_ids)

    @property
    def score_tokens(self) -> int:
        """Most prompt positions whose logits one step may hold; a prompt that can't be split is scored at once."""
        if not self.forward.splits_prompts:
            return self.forward.capacity.tokens
        return max(16, SCORE_BYTES // (4 * self.model.logits_width))

    @torch.inference_mode()
    def launch(self, step: Step) -> Run:
        """Start a step on the device: its forward pass and, unless grammars are to be asked first, its sampling."""
        began = time.perf_counter()
        for sequence in step.started:
            self.batch.start(sequence)
            self.sampler.start(sequence)
            self.forward.start(sequence.slot)
        inputs = self.batch.prepare(step)
        prepared = time.perf_counter()
        run = Run(step, inputs, self._forward(step, inputs))
        self.phases["prepare"] += prepared - began
        self.phases["forward"] += time.perf_counter() - prepared
        if not inputs.constrained:
            self.sample(run)
        return run

    @torch.inference_mode()
    def sample(self, run: Run) -> None:
        """Draw a launched step's tokens. Grammars must have seen all tokens of the steps before."""
        began = time.perf_counter()
        if len(run.inputs.logits_index):
            run.sampled = self.sampler.sample(run.logits, run.inputs)
        self.phases["sample"] += time.perf_counter() - began

    def _forward(self, step: Step, inputs: StepInputs) -> Tensor:
        if inputs.carried is not None:
            places, rows = inputs.carried
            inputs.input_ids[places] = self.sampler.last_tokens[rows]
        logits = self.forward(step, inputs)
        if inputs.copies is not None:
            self.forward.copy_blocks(*inputs.copies)
        return logits

    def collect(self, run: Run) -> Result:
        """Wait for a launched step and read its tokens."""
        began = time.perf_counter()
        sampled, inputs = run.sampled, run.inputs
        if sampled is None:
            return Result([], [])
        tokens, bad = sampled.tokens.tolist(), sampled.bad.tolist()
        draws = [Draw(token, wrong, None, None) for token, wrong in zip(tokens, bad, strict=True)]
        if sampled.logprobs is not None:
            wanted = [inputs.samplers[i].sequence.params.logprobs or 0 for i in sampled.logprob_rows]
            values, tops = _to_host(sampled.logprobs, wanted)
            for i, value, top in zip(sampled.logprob_rows, values, tops, strict=True):
                draws[i].logprob, draws[i].top = value, top
        scores = [] if sampled.prompt is None else _prompt_scores(sampled.prompt, inputs.scored)
        self.phases["sample"] += time.perf_counter() - began
        return Result(draws, scores)


def _to_host(logprobs: Logprobs, wanted: list[int]) -> tuple[list[float], list[TopLogprobs]]:
    ids, values = logprobs.top_ids.tolist(), logprobs.top_values.tolist()
    tops = [TopLogprobs(i[:k], v[:k]) for i, v, k in zip(ids, values, wanted, strict=True)]
    return logprobs.values.tolist(), tops


def _prompt_scores(logprobs: Logprobs, parts: list[ScoredPart]) -> list[tuple[Sequence, PromptLogprobs]]:
    wanted = [part.sequence.params.prompt_logprobs or 0 for part in parts for _ in range(part.count)]
    values, tops = _to_host(logprobs, wanted)
    return [
        (p.sequence, PromptLogprobs(p.start, values[p.row : p.row + p.count], tops[p.row : p.row + p.count]))
        for p in parts
    ]

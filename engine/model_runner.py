"""The only forward pass: one step's tokens through the model, then the sampler.

launch(step)   prepare inputs ─▶ forward ─▶ logits of the rows that need them ─▶ sample ─▶ copy back     (none waits)
collect(run)   wait for the copy, and read what was drawn

A step of plain decodes is a replay of captured graphs where there are any (cuda_graph.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cuda_graph import Capture, CudaCapture, DecodeGraphs, StaticRows, draw_settings
from tokenmill.engine.forward import Forward, PagedForward, build_forward
from tokenmill.engine.input_batch import InputBatch, ScoredPart, StepInputs, pairs
from tokenmill.engine.kernel_choice import configured_kernels
from tokenmill.engine.kernel_set import Adjustments, Penalties, ReferenceKernels
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import PromptLogprobs, TopLogprobs
from tokenmill.engine.request import Sequence
from tokenmill.engine.sampler import Sampled, Sampler
from tokenmill.engine.staging import Fetched
from tokenmill.engine.step import Step

BuildForward = Callable[[LoadedModel, EngineConfig, ReferenceKernels], Forward]
SCORE_BYTES = 1 << 28
"""Float32 logits of scored prompt positions held at once."""


@dataclass(slots=True)
class Run:
    """A launched step: its schedule, its inputs, and its results on the device."""

    step: Step
    inputs: StepInputs
    logits: Tensor
    sampled: Sampled | None = None
    fetched: Fetched | None = None
    """What was drawn, on its way to the host."""


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

    def __init__(self, model: LoadedModel, config: EngineConfig, build: BuildForward = build_forward) -> None:
        self.model = model
        self.device = model.device
        self.kernels = configured_kernels(config, model.device, model.dtype)
        self.phases: dict[str, float] = defaultdict(float)
        self.kernels.reserve(config.max_batch, model.logits_width)
        self.forward: Forward = build(model, config, self.kernels)
        self.max_context = min(model.max_context, self.forward.capacity.tokens)
        block_size = self.forward.capacity.block_size
        blocks = -(-self.max_context // block_size)
        self.batch = InputBatch(config.max_batch, blocks, block_size, model.device)
        self.sampler = Sampler(self.kernels, self.batch, model.logits_width, list(model.eos_ids))
        self.graphs: DecodeGraphs | None = None

    @property
    def score_tokens(self) -> int:
        """Most prompt positions whose logits one step may hold; a prompt that can't be split is scored at once."""
        if not self.forward.splits_prompts:
            return self.forward.capacity.tokens
        return max(16, SCORE_BYTES // (4 * self.model.logits_width))

    # ---------------------------------------------------------------- graphs

    @property
    def can_capture(self) -> bool:
        """Whether this model's decode steps can be captured on these kernels."""
        return isinstance(self.forward, PagedForward) and self.forward.can_be_captured

    def make_graphs(self, capture: Capture | None = None) -> None:
        """Allocate what captured steps need; `capture_next` then captures one bucket after the other."""
        assert isinstance(self.forward, PagedForward)
        rows, width, device = len(self.batch.seed), self.model.logits_width, self.device
        self.graphs = DecodeGraphs(
            self.kernels,
            self.forward.decode,
            StaticRows(rows, self.batch.max_blocks, device),
            torch.zeros(rows, width, dtype=self.model.dtype, device=device),
            self.sampler.last_tokens,
            self.sampler.counts(),
            capture or CudaCapture(device),
        )
        self.kernels.compile_ahead(self._rehearse)
        self._compile_what_graphs_leave_out(self.graphs)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Call what `_compile_what_graphs_leave_out` and the captures will launch."""
        assert self.graphs is not None
        self._compile_what_graphs_leave_out(self.graphs)
        with self.kernels.overlapping():
            self.graphs.rehearse()

    @torch.inference_mode()
    def _compile_what_graphs_leave_out(self, graphs: DecodeGraphs) -> None:
        """Sampling of what no graph samples, and the copies of forks: compiled now, not while a client waits.

        That is a prompt's first token, bias, masks of grammars, log-probabilities. All run on rows that are padding.
        """
        one = graphs.rows.first(1)
        settings = draw_settings(one)
        logits, nobody, counts = graphs.logits[:1], one["lines"], self.sampler.counts()
        rates = one["repetition"], one["presence"], one["frequency"]
        zeros = torch.zeros_like(nobody)
        bias = zeros, zeros, one["presence"]
        mask = zeros, torch.zeros(1, -(-logits.shape[1] // 32), dtype=torch.int32, device=self.device)
        masked = self.kernels.adjust(logits, Adjustments(bias, (), mask))
        penalties = Penalties(nobody, *counts, *rates)
        penalized = self.kernels.adjust(logits, Adjustments(bias, (penalties, penalties)))
        for filtered in (False, True):
            self.kernels.draw(logits, settings, filtered=filtered)
            self.kernels.draw(masked, settings, filtered=filtered)
            self.kernels.draw(penalized, settings, filtered=filtered, counted=(nobody, counts[0]))
        self.kernels.token_logprobs(logits, zeros, 0)
        self.forward.copy_blocks(nobody, nobody)
        self.forward.copy_states(one["rows"], one["rows"])

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Capture one more bucket of decode steps, between steps; False when there is none left."""
        if self.graphs is None:
            return False
        with self.kernels.overlapping():
            return self.graphs.capture_next()

    # ---------------------------------------------------------------- a step

    @torch.inference_mode()
    def launch(self, step: Step) -> Run:
        """Start a step on the device: its forward pass and, unless grammars are to be asked first, its sampling."""
        began = time.perf_counter()
        for sequence in step.started:
            self.batch.start(sequence)
            self.sampler.start(sequence)
            self.forward.start(sequence.slot)
        bucket = self._bucket(step)
        inputs = self._prepare_decode(step, bucket) if bucket else self.batch.prepare(step)
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
        if run.inputs.samplers or run.inputs.scored:
            run.sampled = self._draw(run)
            run.fetched = self.batch.staging.fetch(_tensors(run.sampled))
        self.phases["sample"] += time.perf_counter() - began

    def _bucket(self, step: Step) -> int:
        """The captured bucket that can run this step; 0 if none can: a row that is more than a decode, say."""
        if self.graphs is None or not step.chunks or step.copies:
            return 0
        for chunk in step.chunks:
            plain = chunk.count == 1 and not chunk.drafts and len(chunk.samplers) == 1
            if not plain:
                return 0
        return self.graphs.bucket_for(len(step.chunks))

    def _prepare_decode(self, step: Step, bucket: int) -> StepInputs:
        """Fill the graphs' rows for a step of decodes."""
        assert self.graphs is not None
        batch, decode, rows = self.batch, self.batch.prepare_decode(step), self.graphs.rows
        slots, count = decode.rows, len(decode.rows)
        rows.fill(
            bucket,
            {
                "positions": decode.positions,
                "slots": decode.slots,
                "rows": slots,
                "lines": np.where(batch.penalized[slots], slots, -1),
                "generated": decode.generated,
                "seeds": batch.seed[slots],
                "top_k": batch.top_k[slots],
                "temperature": batch.temperature[slots],
                "min_p": batch.min_p[slots],
                "top_p": batch.top_p[slots],
                "repetition": batch.repetition[slots],
                "presence": batch.presence[slots],
                "frequency": batch.frequency[slots],
                "seq_lens": decode.positions + 1,
            },
        )
        arrays: list[NDArray[Any]] = list(decode.known or ())
        table, saves = rows.needs_table(batch.version, slots), pairs(step.saves)
        arrays += [decode.table] if table else []
        put = batch.staging.put([*arrays, *saves]) if arrays or saves else []
        leavings = (put[-2], put[-1]) if saves else None
        if decode.known is not None:
            self.sampler.last_tokens.index_copy_(0, put[0], put[1])
        if table:
            rows.set_table(put[len(arrays) - 1])
        fields = rows.first(count)
        return StepInputs(
            input_ids=fields["rows"],
            positions=fields["positions"],
            slots=fields["slots"],
            block_table=rows.table[:count],
            seq_lens=fields["seq_lens"],
            query_start=rows.query_start[: count + 1],
            logits_index=fields["rows"],
            decodes=count,
            carried=None,
            scored=[],
            targets=fields["rows"][:0],
            samplers=decode.samplers,
            rows=slots,
            generated=decode.generated,
            lines=fields["rows"],
            settings=draw_settings(fields),
            copies=None,
            chunk_rows=fields["rows"],
            constrained=any(row.sequence.matcher is not None for row in decode.samplers),
            bucket=bucket,
            leavings=leavings,
        )

    def _forward(self, step: Step, inputs: StepInputs) -> Tensor:
        if inputs.bucket:
            assert self.graphs is not None
            logits = self.graphs.run(inputs.bucket)[: len(inputs.rows)]
            if inputs.leavings is not None:
                self.forward.copy_states(*inputs.leavings)
            return logits
        if inputs.restores is not None:
            self.forward.copy_states(*inputs.restores)
        if inputs.carried is not None:
            places, rows = inputs.carried
            inputs.input_ids[places] = self.sampler.last_tokens[rows]
        logits = self.forward(step, inputs)
        if inputs.copies is not None:
            self.forward.copy_blocks(*inputs.copies)
        if inputs.leavings is not None:
            self.forward.copy_states(*inputs.leavings)
        return logits

    def _draw(self, run: Run) -> Sampled:
        inputs = run.inputs
        variant = "none"
        if inputs.bucket and not inputs.constrained:
            variant = self.sampler.graph_variant(inputs.rows, inputs.generated)
        if variant == "none":
            return self.sampler.sample(run.logits, inputs)
        assert self.graphs is not None
        self.graphs.draw(inputs.bucket, variant)
        tokens, flags = self.graphs.results[:, : len(inputs.rows)]
        packed = self.graphs.results
        return self.sampler.score(Sampled(tokens, flags, [], None, None, packed), run.logits, inputs)

    def collect(self, run: Run) -> Result:
        """Wait for a launched step and read its tokens."""
        began = time.perf_counter()
        sampled, inputs = run.sampled, run.inputs
        if sampled is None or run.fetched is None:
            return Result([], [])
        arrays = run.fetched.wait()
        count = len(inputs.samplers)
        if sampled.packed is not None:
            tokens, flags = arrays.pop(0)[:, :count]
        else:
            tokens, flags = arrays.pop(0), arrays.pop(0)
        draws = [
            Draw(token, bool(wrong), None, None)
            for token, wrong in zip(tokens.tolist(), flags.tolist(), strict=True)
        ]
        if sampled.logprobs is not None:
            wanted = [inputs.samplers[i].sequence.params.logprobs or 0 for i in sampled.logprob_rows]
            values, tops = _to_host(arrays[:3], wanted)
            arrays = arrays[3:]
            for i, value, top in zip(sampled.logprob_rows, values, tops, strict=True):
                draws[i].logprob, draws[i].top = value, top
        scores = [] if sampled.prompt is None else _prompt_scores(arrays, inputs.scored)
        self.phases["sample"] += time.perf_counter() - began
        return Result(draws, scores)


def _tensors(sampled: Sampled) -> list[Tensor]:
    """What `collect` reads, in its order."""
    drawn = [sampled.tokens, sampled.flags] if sampled.packed is None else [sampled.packed]
    scores = [part.tensors for part in (sampled.logprobs, sampled.prompt) if part is not None]
    return [*drawn, *(tensor for part in scores for tensor in part)]


def _to_host(arrays: list[NDArray[Any]], wanted: list[int]) -> tuple[list[float], list[TopLogprobs]]:
    picked, ids, values = (array.tolist() for array in arrays)
    tops = [TopLogprobs(i[:k], v[:k]) for i, v, k in zip(ids, values, wanted, strict=True)]
    return picked, tops


def _prompt_scores(
    arrays: list[NDArray[Any]], parts: list[ScoredPart]
) -> list[tuple[Sequence, PromptLogprobs]]:
    wanted = [part.sequence.params.prompt_logprobs or 0 for part in parts for _ in range(part.count)]
    values, tops = _to_host(arrays, wanted)
    return [
        (p.sequence, PromptLogprobs(p.start, values[p.row : p.row + p.count], tops[p.row : p.row + p.count]))
        for p in parts
    ]

"""Drives the engine in this process, step by step, and takes the times.

    ┌ mixed step: prompts are computed, other requests may decode ┐┌ decode step ┐┌ decode step ┐ …
    prefill_seconds                                                decode_seconds

Prefill and decode are told apart by what a step did: one in which the count of computed prompt tokens rose
belongs to prefill. The time until the first token of a request counts from its submission.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmill.bench.options import BenchError
from tokenmill.bench.timeline import Timeline
from tokenmill.bench.workload import Job

if TYPE_CHECKING:
    from tokenmill.engine.llm import LLM
    from tokenmill.engine.messages import Delta

PHASES = ("schedule", "prepare", "forward", "sample", "deliver")


@dataclass(slots=True)
class Run:
    """One measured run. Seconds are of wall time; `phases` are the engine's own account of its steps."""

    batch: int
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    """Tokens that came out of decode steps."""
    decode_steps: list[float] = field(default_factory=list)
    """Seconds of each."""
    timelines: list[Timeline] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        return sum(len(timeline.arrivals) for timeline in self.timelines)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of each request, as they really were."""
        return [(timeline.prompt_tokens, len(timeline.arrivals)) for timeline in self.timelines]


class Driver:
    """Runs jobs on an `LLM`, at most `batch` of them at once, without the cost of making text."""

    def __init__(self, llm: LLM, temperature: float = 0.0) -> None:
        self.engine = llm.engine
        self.tokenizer = llm.tokenizer
        self.temperature = temperature
        self._requests = 0

    def run(
        self, jobs: Iterable[Job], batch: int, on_tokens: Callable[[int], object] = lambda count: None
    ) -> Run:
        """Serve `jobs` to their full lengths. Raises `BenchError` when one fails."""
        waiting = deque((self._ids(job), job.output_tokens) for job in jobs)
        run, live = Run(batch), dict[int, Timeline]()
        phases_before, prompts_before = self._counters()
        began = time.perf_counter()
        while waiting or live:
            while waiting and len(live) < batch:
                self._submit(*waiting.popleft(), run, live)
            stepped = time.perf_counter()
            deltas = self.engine.step()
            now = time.perf_counter()
            tokens = self._record(deltas, live, now)
            prompts = self.engine.prompt_tokens
            _account(run, now - stepped, tokens, prompts - prompts_before)
            prompts_before = prompts
            on_tokens(tokens)
        run.seconds = time.perf_counter() - began
        phases, _ = self._counters()
        run.phases = {name: phases.get(name, 0.0) - phases_before.get(name, 0.0) for name in PHASES}
        return run

    def _ids(self, job: Job) -> list[int]:
        return self.tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt

    def _counters(self) -> tuple[dict[str, float], int]:
        stats = self.engine.stats()
        return stats.step_seconds, stats.prompt_tokens

    def _submit(self, ids: list[int], output_tokens: int, run: Run, live: dict[int, Timeline]) -> None:
        from tokenmill.engine.messages import Add
        from tokenmill.engine.sampling_params import SamplingParams

        self._requests += 1
        timeline = Timeline(time.perf_counter(), len(ids))
        try:
            params = SamplingParams(max_tokens=output_tokens, temperature=self.temperature, ignore_eos=True)
            self.engine.add(Add(self._requests, ids, params))
        except ValueError as error:
            raise BenchError(f"the engine refused a request: {error}") from None
        run.timelines.append(timeline)
        live[self._requests] = timeline

    @staticmethod
    def _record(deltas: list[Delta], live: dict[int, Timeline], now: float) -> int:
        tokens = 0
        for delta in deltas:
            if delta.error is not None:
                raise BenchError(f"a request failed: {delta.error}")
            live[delta.request].arrivals.extend([now] * len(delta.token_ids))
            tokens += len(delta.token_ids)
            if delta.finish is not None:
                del live[delta.request]
        return tokens


def _account(run: Run, seconds: float, tokens: int, prompt_tokens: int) -> None:
    if prompt_tokens:
        run.prefill_seconds += seconds
        run.prompt_tokens += prompt_tokens
    else:
        run.decode_seconds += seconds
        run.decode_tokens += tokens
        run.decode_steps.append(seconds)

"""What one HTTP request generates: for each prompt a request to the engine, for each candidate a choice.

Deltas come in on the event loop, many choices in one frame. They become text here at once; whoever waits
(`news`) is woken when there is something to send, or only at the end when nothing is streamed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.messages import Add, Delta, PromptLogprobs, TopLogprobs
from tokenmill.server.admission import Job
from tokenmill.server.context import RequestContext
from tokenmill.server.errors import ClientGone, bad_request, internal_error, unavailable
from tokenmill.server.guard import Guard
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.metrics import ModelMetrics
from tokenmill.server.place import Place
from tokenmill.server.prompts import PromptInput

logger = logging.getLogger(__name__)

MAX_UNSENT_TOKENS = 4096
"""Tokens that may wait for a client that doesn't read; past it, the request is aborted."""


@dataclass(slots=True, eq=False)
class Choice:
    """One candidate: its tokens, its text, and how it ended. `eq=False`: a choice is itself, whatever it holds."""

    run: PromptRun
    index: int
    """Place among all choices of the answer."""
    detokenizer: Detokenizer
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    text: str = ""
    """Text that is ready and not taken yet."""
    finish_reason: str | None = None
    first: float = 0.0
    """When its first tokens came: monotonic seconds, 0 before."""
    last: float = 0.0
    """When its latest tokens came."""
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    def take(self, delta: Delta) -> str:
        """Add the news of the engine; the text that they release."""
        before = self.detokenizer.token_count
        text = self.detokenizer.push(delta.token_ids, delta.finish is not None, delta.stop_token)
        self.text += text
        # Tokens after the one that completed a stop were made in vain.
        added = self.detokenizer.token_count - before
        self.ids += delta.token_ids[:added]
        self.accepted_drafts += min(delta.accepted_drafts, added)
        self.rejected_drafts += delta.rejected_drafts
        if delta.logprobs is not None and delta.top is not None:
            self.logprobs += delta.logprobs[:added]
            self.top += delta.top[:added]
        if self.detokenizer.stopped:
            self.finish_reason = "stop"
        elif delta.finish is not None:
            self.finish_reason = delta.finish
        return text

    def take_text(self) -> str:
        """The text that nobody has taken yet."""
        text, self.text = self.text, ""
        return text

    @property
    def mean_logprob(self) -> float:
        """How likely the candidate is, per token: best_of's order."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


class PromptRun:
    """One prompt in the engine, with its choices: the sink of its deltas."""

    def __init__(self, generation: Generation, request: int, prompt: PromptInput, first_index: int) -> None:
        params = generation.job.params
        tokenizer = generation.job.tokenizer or generation.engine.tokenizer
        self.request = request
        self.prompt = prompt
        self.cached_tokens = 0
        self.scores: list[float] = []
        self.score_top: list[TopLogprobs] = []
        self.choices = [
            Choice(
                self,
                first_index + i,
                Detokenizer(
                    tokenizer,
                    params.stop,
                    params.include_stop,
                    params.skip_special_tokens,
                    params.min_tokens,
                    prompt.ids,
                ),
            )
            for i in range(params.candidates)
        ]
        self.unfinished = len(self.choices)
        self.ranked: list[Choice] | None = None
        """All choices, best first, where something else than their own likelihood decides."""
        self._generation = generation
        self._scores_due = len(prompt.ids) - 1 if params.prompt_logprobs is not None else 0

    @property
    def scored(self) -> bool:
        """Whether all log-probabilities of the prompt that were asked for are here."""
        return len(self.scores) >= self._scores_due

    def best(self, count: int) -> list[Choice]:
        """The choices that the client gets; of more candidates than these the likeliest, best first."""
        if self.ranked is not None:
            return self.ranked[:count]
        if len(self.choices) == count:
            return self.choices
        return sorted(self.choices, key=lambda choice: -choice.mean_logprob)[:count]

    def on_delta(self, delta: Delta, now: float) -> None:
        try:
            self._generation.on_delta(self, delta, now)
        except Exception:
            logger.exception("%s: an output of the engine can't be used", self._generation.name)
            self._generation.guard.interrupt(internal_error(self._generation.name))

    def on_process_lost(self, reason: str) -> None:
        self._generation.guard.interrupt(unavailable(reason, "engine_down", 1))

    def add_scores(self, part: PromptLogprobs) -> None:
        """A part of the prompt's log-probabilities; a part that comes again is skipped."""
        known = len(self.scores) + 1 - part.start
        self.scores += part.values[known:]
        self.score_top += part.top[known:]


class Generation:
    """All runs of one request. `close` it whatever happens: it takes back what the engine still works on."""

    def __init__(
        self,
        context: RequestContext,
        engine: Engine,
        job: Job,
        guard: Guard,
        place: Place,
        metrics: ModelMetrics,
        streams: bool,
    ) -> None:
        self.name = context.name
        self._context = context
        self.engine = engine
        self.job = job
        self.guard = guard
        self.blocked = False
        """Set while a send waits for the client to read."""
        self.watch: Callable[[Choice, str, float], None] | None = None
        """Sees each choice's new text and its time; it may end the choice by giving it a finish reason."""
        self._place = place
        self._metrics = metrics
        self._arrival = context.arrival
        self.streams = streams
        """Whether its news are taken as they come."""
        self._changed: dict[Choice, None] = {}
        self._unsent = 0
        self._wake = asyncio.Event()
        self._started = False
        self._parts: list[Generation] = []
        count = job.params.candidates
        self.runs = [
            PromptRun(self, engine.client.new_id(), prompt, position * count)
            for position, prompt in enumerate(job.prompts)
        ]
        self._unfinished = len(self.runs)
        self.awaited = 0
        """Clips of its choices that are still being spoken."""

    def start(self) -> None:
        """Hand every prompt to the engine. Raises `ApiError` 503 when it has just gone."""
        if self.engine.client.lost is not None:
            raise unavailable(self.engine.client.lost, "engine_down", 1)
        job = self.job
        for run in self.runs:
            add = Add(run.request, run.prompt.ids, job.params, job.priority, job.cache_salt, job.prediction)
            self.engine.client.add(add, run)

    def close(self) -> None:
        """Stop what still runs in the engine."""
        for run in self.runs:
            if run.unfinished:
                self.engine.client.abort(run.request)

    def part(self, job: Job) -> Generation:
        """Another generation for the same answer: its usage counts as this one's."""
        part = Generation(
            self._context, self.engine, job, self.guard, self._place, self._metrics, streams=False
        )
        self._parts.append(part)
        return part

    def returned(self) -> list[Choice]:
        """The choices that the client gets, numbered by their places in the answer."""
        choices = [choice for run in self.runs for choice in run.best(self.job.params.n)]
        for index, choice in enumerate(choices):
            choice.index = index
        return choices

    @property
    def done(self) -> bool:
        """Whether every choice has ended, its sound included where it has one."""
        return not (self._unfinished or self.awaited)

    def wake(self) -> None:
        """There is news of something else than tokens."""
        self._wake.set()

    async def finished(self) -> None:
        """Wait until it is done."""
        while not self.done:
            await self._wake.wait()
            self._wake.clear()

    async def news(self) -> list[Choice]:
        """Wait until choices have something new, and take them."""
        await self._wake.wait()
        self._wake.clear()
        self._unsent = 0
        held = {
            choice: None for choice in self._changed if not choice.run.scored and not choice.finish_reason
        }
        ready = [choice for choice in self._changed if choice not in held]
        self._changed = held
        return ready

    def on_delta(self, run: PromptRun, delta: Delta, now: float) -> None:
        """Take in the news of one choice, and wake who waits for it."""
        choice = run.choices[delta.choice]
        if delta.cached_tokens is not None:
            run.cached_tokens = delta.cached_tokens
        if delta.prompt_logprobs is not None:
            run.add_scores(delta.prompt_logprobs)
        if choice.finish_reason is not None:
            return
        if delta.finish in ("error", "abort"):
            self._fail(delta)
            return
        if delta.token_ids:
            self._observe(choice, len(delta.token_ids), now)
        text = choice.take(delta)
        if self.watch is not None and text:
            self.watch(choice, text, now)
        if choice.finish_reason is not None:
            self._finish(run, delta)
        if self.streams:
            self._changed[choice] = None
            self._unsent += len(delta.token_ids)
            if self.blocked and self._unsent > MAX_UNSENT_TOKENS:
                self.guard.interrupt(ClientGone("the client doesn't read its stream"))
            self._wake.set()
        elif self.done:
            self._wake.set()

    def _finish(self, run: PromptRun, delta: Delta) -> None:
        """A choice has ended; where a stop string ended it, the engine doesn't know yet."""
        run.unfinished -= 1
        if run.unfinished:
            if delta.finish is None:
                self.engine.client.abort(run.request, delta.choice)
            return
        if delta.finish is None:
            self.engine.client.abort(run.request)
        else:
            self.engine.client.forget(run.request)
        self._unfinished -= 1

    def _fail(self, delta: Delta) -> None:
        if delta.finish == "abort":
            self.guard.interrupt(unavailable("the model's engine gave the request up", "engine_down", 1))
            return
        if delta.invalid:
            param, reason = self.job.grammar_param, delta.error or "the engine refused the request"
            self.guard.interrupt(bad_request(f"{param}: {reason}" if param else reason, param))
            return
        logger.error("%s: the engine failed on choice %d: %s", self.name, delta.choice, delta.error)
        self.guard.interrupt(internal_error(self.name))

    def _observe(self, choice: Choice, tokens: int, now: float) -> None:
        if not self._started:
            self._started = True
            self._place.start()
            self._metrics.time_to_first_token.observe(now - self._arrival)
        if choice.last:
            self._metrics.inter_token.observe((now - choice.last) / tokens, tokens)
        choice.first = choice.first or now
        choice.last = now

    def head(self, kind: str, model: str) -> dict[str, object]:
        """What every answer and every chunk of it begins with; `model` is the name that was asked for."""
        return {
            "id": self.name,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self.engine.ready.fingerprint,
        }

    def usage(self, reasoning_tokens: int = 0) -> dict[str, object]:
        """What was used so far: every candidate counts, through the token that completed its stop."""
        runs = [run for part in (self, *self._parts) for run in part.runs]
        choices = [choice for run in runs for choice in run.choices]
        # Drafts from a request's own text are the server's affair.
        predicted = choices if self.job.prediction is not None else []
        prompt = sum(len(run.prompt.ids) for run in runs)
        completion = sum(choice.detokenizer.token_count for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(run.cached_tokens for run in runs)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(choice.accepted_drafts for choice in predicted),
                "rejected_prediction_tokens": sum(choice.rejected_drafts for choice in predicted),
                "reasoning_tokens": reasoning_tokens,
                "audio_tokens": 0,
            },
        }

"""The loop: schedule, launch, collect, deliver.

    overlap off   │schedule N│launch N      │collect N│schedule N+1│…
    overlap on    │schedule N+1│launch N+1  │collect N│schedule N+2│…      the device works on N+1 meanwhile

With overlap a sequence may run one step past its end; that step's token is dropped. Each fault stays with the
request that it belongs to: a row of NaN ends one sequence, and a step that raises is undone and its sequences
are tried alone, so that only the one that raises again is failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.messages import Add, Delta, FinishReason, PromptLogprobs, Ready, Stats
from tokenmill.engine.model_runner import Draw, ModelRunner, Run
from tokenmill.engine.request import Sequence, Status, make_sequences
from tokenmill.engine.sampling_params import random_seed
from tokenmill.engine.scheduler import Scheduler, Step

CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 8192
SMALLEST_BATCH_TOKENS = 16


class InvalidRequest(ValueError):
    """A request that the engine can't take; the message says why."""


class Engine:
    """One model, in this process and this thread."""

    def __init__(
        self, config: EngineConfig, progress: Callable[[str, float | None], None] = lambda stage, done: None
    ) -> None:
        """Load the model and allocate its cache. Raises `loader.LoadError` with one line."""
        began = time.perf_counter()
        self.config = config
        self.model: LoadedModel = load(config, progress)
        self.runner = ModelRunner(self.model, config)
        on_gpu = self.model.device.type == "cuda"
        self.overlap = on_gpu if config.overlap is None else config.overlap
        self.pool = BlockPool(self.runner.cache.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch=config.max_batch,
            max_batch_tokens=config.max_batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS),
            score_tokens=self.runner.score_tokens,
            prefix_cache=config.kv_cache.prefix_cache,
        )
        self._requests: dict[int, list[Sequence]] = {}
        self._in_flight: Run | None = None
        self._deltas: list[Delta] = []
        self._arrivals = 0
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self.load_seconds = time.perf_counter() - began

    # ---------------------------------------------------------------- in

    def add(self, message: Add) -> None:
        """Queue a request. Raises `InvalidRequest`; nothing is queued then."""
        self._validate(message)
        params = message.params
        seed = random_seed() if params.seed is None else params.seed
        first = make_sequences(
            message.request, message.prompt, params, seed, self._arrivals, message.priority, message.cache_salt
        )
        self._arrivals += 1
        self._requests[message.request] = [first, *first.children]
        self.scheduler.add(first)

    def _validate(self, message: Add) -> None:
        prompt, params, width = message.prompt, message.params, self.model.logits_width
        if message.request in self._requests:
            raise InvalidRequest(f"request {message.request} is running already")
        if not prompt:
            raise InvalidRequest("the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) >= width:
            raise InvalidRequest(f"prompt token ids must lie in 0..{width - 1}")
        if len(prompt) + params.max_tokens > self.runner.max_context:
            raise InvalidRequest(
                f"This model's maximum context length is {self.runner.max_context} tokens, but "
                f"{len(prompt)} prompt tokens and {params.max_tokens} to generate were asked for"
            )
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= width:
                    raise InvalidRequest(f"{name}: token id {token} is not in 0..{width - 1}")

    def abort(self, request: int, choice: int | None = None) -> None:
        """Stop a choice, or all of a request, at once. Unknown ids are ignored."""
        for sequence in list(self._requests.get(request, ())):
            if choice is None or sequence.choice == choice:
                orphans = self._finish(sequence, "abort")
                if orphans and choice is not None:
                    orphans[0].children = orphans[1:]
                    self.scheduler.add(orphans[0])

    # ---------------------------------------------------------------- the step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def step(self) -> list[Delta]:
        """Run the loop once; returns the news since the last call."""
        run: Run | None = None
        step = Step()
        try:
            began = time.perf_counter()
            step = self.scheduler.schedule()
            self.runner.phases["schedule"] += time.perf_counter() - began
            run = self.runner.launch(step) if step.chunks else None
            if self.overlap and not self.scheduler.suspects:
                run, self._in_flight = self._in_flight, run
            if run is not None:
                self._collect(run)
        except Exception as error:
            self._recover(error, run, step)
        self._steps += 1
        deltas, self._deltas = self._deltas, []
        return deltas

    def _collect(self, run: Run) -> None:
        result = self.runner.collect(run)
        began = time.perf_counter()
        for sequence, scores in result.scores:
            if sequence.status is not Status.FINISHED:
                self._deliver_scores(sequence, scores)
        bad = {id(draw.sequence) for draw in result.draws if draw.bad}
        for chunk in run.step.chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.count
            self._prompt_tokens += max(0, min(stop, len(sequence.prompt)) - chunk.start)
            if id(sequence) not in bad:
                self.scheduler.commit(sequence, stop)
            if stop == len(sequence.prompt) and sequence.params.max_tokens == 0:
                self._end(sequence, "length")
        for draw in result.draws:
            if draw.sequence.status is not Status.FINISHED:
                self._record(draw)
        self.runner.phases["deliver"] += time.perf_counter() - began

    def _record(self, draw: Draw) -> None:
        sequence = draw.sequence
        if draw.bad:
            self._fail(sequence, "the model produced no finite logits")
            return
        self.scheduler.append(sequence, draw.token)
        self.scheduler.cleared(sequence)
        self._generated_tokens += 1
        reason = self._reason_to_stop(sequence, draw.token)
        delta = Delta(sequence.request, sequence.choice, [draw.token], finish=reason)
        if draw.logprob is not None and draw.top is not None:
            delta.logprobs, delta.top = [draw.logprob], [draw.top]
        if reason == "stop":
            delta.stop_token = draw.token
        self._send(sequence, delta)
        if reason is not None:
            self._finish(sequence, reason)

    def _reason_to_stop(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.params
        if len(sequence.output) > params.min_tokens:
            ends = token in self.model.eos_ids and not params.ignore_eos
            if ends or token in params.stop_token_ids:
                return "stop"
        return "length" if len(sequence.output) >= params.max_tokens else None

    def _send(self, sequence: Sequence, delta: Delta) -> None:
        if sequence.choice == 0 and not sequence.announced:
            sequence.announced = True
            delta.cached_tokens = sequence.cached_tokens or 0
            self._cached_tokens += delta.cached_tokens
        self._deltas.append(delta)

    def _deliver_scores(self, sequence: Sequence, scores: PromptLogprobs) -> None:
        self._deltas.append(Delta(sequence.request, sequence.choice, [], prompt_logprobs=scores))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence that draws nothing (max_tokens 0), and the children that waited for it."""
        if sequence.status is Status.FINISHED:
            return
        for one in [sequence, *sequence.children]:
            self._send(one, Delta(one.request, one.choice, [], finish=reason))
        for one in [sequence, *self._finish(sequence, reason)]:
            self._finish(one, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> list[Sequence]:
        if sequence.status is Status.FINISHED:
            return []
        orphans = self.scheduler.finish(sequence, reason)
        choices = self._requests.get(sequence.request, [])
        if all(choice.status is Status.FINISHED for choice in choices):
            self._requests.pop(sequence.request, None)
        return orphans

    # ---------------------------------------------------------------- when something goes wrong

    def _fail(self, sequence: Sequence, reason: str) -> None:
        for one in [sequence, *sequence.children]:
            self._deltas.append(Delta(one.request, one.choice, [], finish="error", error=reason))
        for one in [sequence, *self._finish(sequence, "error")]:
            self._finish(one, "error")

    def _recover(self, error: Exception, run: Run | None, step: Step) -> None:
        """Undo the steps under way; fail a sequence that raised alone, try the others one by one."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        alone = self.scheduler.suspects[0] if self.scheduler.suspects else None
        steps = [step] + [other.step for other in (run, self._in_flight) if other is not None]
        self._in_flight = None
        for undone in {id(s): s for s in steps}.values():
            self.scheduler.rewind(undone)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            if self.scheduler.max_batch_tokens > SMALLEST_BATCH_TOKENS:
                self.scheduler.max_batch_tokens //= 2
                self.scheduler.suspects.clear()
                return
        if alone is not None:
            self._fail(alone, f"the step failed: {type(error).__name__}")

    # ---------------------------------------------------------------- what it says of itself

    def ready(self) -> Ready:
        """The message that tells the front end all it needs."""
        model = self.model
        return Ready(
            tokenizer=model.tokenizer,
            logits_width=model.logits_width,
            max_context=self.runner.max_context,
            block_size=self.config.block_size,
            num_blocks=self.pool.num_blocks,
            max_batch=self.config.max_batch,
            fingerprint=model.fingerprint,
            description=model.description,
            model_type=model.model_type,
            load_seconds=self.load_seconds,
        )

    def stats(self) -> Stats:
        scheduler, pool = self.scheduler, self.pool
        return Stats(
            step=self._steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=pool.used_blocks,
            cached_blocks=pool.cached_blocks,
            free_blocks=pool.free_blocks,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            step_seconds=dict(self.runner.phases),
        )

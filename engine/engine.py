"""The loop: schedule, launch, collect, deliver.

    overlap off   │schedule N│launch N      │collect N│schedule N+1│…
    overlap on    │schedule N+1│launch N+1  │collect N│schedule N+2│…      the device works on N+1 meanwhile

With overlap a sequence may run one step past its end; that step's token is dropped. A step that raises is undone
and its sequences are tried alone, so that only the one that raises again is failed. What comes of a step that
doesn't is recorded in `delivery.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.delivery import Delivery
from tokenmill.engine.forward import build_forward
from tokenmill.engine.grammar import GrammarCompiler, GrammarError
from tokenmill.engine.grammar_queue import GrammarQueue
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.messages import Add, Delta, Ready, Stats
from tokenmill.engine.model_runner import ModelRunner, Result, Run
from tokenmill.engine.rank_link import RanksLost
from tokenmill.engine.request import make_sequences
from tokenmill.engine.sampling_params import random_seed
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.snapshots import Snapshots
from tokenmill.engine.step import Step

if TYPE_CHECKING:
    from tokenmill.engine.team import Team

logger = logging.getLogger("tokenmill.engine")
CPU_BATCH_TOKENS = 512
CPU_QUIET_TOKENS = 1024
GPU_BATCH_TOKENS = 8192
SMALLEST_BATCH_TOKENS = 16
CPU_DRAFT_ROWS = 16
GPU_DRAFT_ROWS = 64
MOST_IDLE_STEPS = 1000
GRAMMAR_WAIT_S = 0.01
"""How long an engine that has nothing else to do waits for a grammar in one step."""


def _start_team(config: EngineConfig, own_process: bool) -> Team:
    """Only a model of several ranks has to do with torch.distributed."""
    from tokenmill.engine.team import Team

    return Team(config, own_process)


def _out_of_memory(error: Exception) -> bool:
    """Whether a step was too large for the memory. On a CPU torch has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class InvalidRequest(ValueError):
    """A request that the engine can't take; the message says why."""


class Engine:
    """One model, in this process and this thread."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str, float | None], None] = lambda stage, done: None,
        *,
        model: LoadedModel | None = None,
        own_process: bool = False,
    ) -> None:
        """Load the model, or take over a loaded one, and allocate its cache; raises `loader.LoadError`, one line.

        `own_process`: nothing else is in this one, which ends when the process of another rank does.
        """
        began = time.perf_counter()
        self._team = None if config.tensor_parallel == 1 else _start_team(config, own_process)
        self.config = config = config if self._team is None else self._team.config
        try:
            self.model: LoadedModel = load(config, progress) if model is None else model
            on_gpu = self.model.device.type == "cuda"
            self._gpu = self.model.device if on_gpu else None
            self._select_device()
            build = build_forward if self._team is None else self._team.build_forward
            self.runner = ModelRunner(self.model, config, build)
            if config.speculation_ngram and not self.runner.forward.shares_prefixes:
                raise LoadError(
                    f"{config.source}: speculation.ngram isn't possible: a {self.model.model_type} "
                    "can't take wrong drafts back; leave it out"
                )
        except BaseException:
            self.close()
            raise
        self.overlap = on_gpu if config.overlap is None else config.overlap
        forward = self.runner.forward
        logger.info("%s: %s; %s", config.source, self.model.description, forward.name)
        self.pool = BlockPool(
            forward.capacity.num_blocks, forward.capacity.block_size, forward.capacity.history
        )
        self.scheduler = self._make_scheduler(on_gpu)
        self._delivery = Delivery(self.scheduler, self.runner.sampler, self.model.eos_ids)
        self._grammars = GrammarQueue(
            GrammarCompiler(self.model.tokenizer.tokenizer_json, self.model.logits_width, self.model.eos_ids)
        )
        self._in_flight: Run | None = None
        self._arrivals = self._idle_steps = self._steps = 0
        self.warming = on_gpu and self.runner.can_capture
        """Whether decode steps are still to be captured."""
        if self.warming:
            progress("compiling the GPU kernels", None)
            self.runner.make_graphs()
            self.warm_up_next()
        self.idle_work = True
        """Whether an idle moment is of use (`work_idly`)."""
        self.load_seconds = time.perf_counter() - began

    def _make_scheduler(self, on_gpu: bool) -> Scheduler:
        config, forward = self.config, self.runner.forward
        step_tokens = config.max_batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
        copies = forward.capacity.snapshots
        resumes = forward.shares_prefixes or copies > 0
        return Scheduler(
            self.pool,
            max_batch=config.max_batch,
            max_batch_tokens=step_tokens if forward.splits_prompts else forward.capacity.tokens,
            quiet_tokens=0 if on_gpu or config.max_batch_tokens else CPU_QUIET_TOKENS,
            score_tokens=self.runner.score_tokens,
            prefix_cache=config.kv_cache.prefix_cache and resumes,
            states=Snapshots(config.max_batch + 1, copies) if copies else None,
            draft_rows=(GPU_DRAFT_ROWS if on_gpu else CPU_DRAFT_ROWS) if forward.shares_prefixes else 0,
        )

    def close(self) -> None:
        """End the processes of other ranks, where there are any; the engine can't step afterwards."""
        if self._team is not None:
            self._team.close()

    def _select_device(self) -> None:
        """Events, streams and Triton's launches go to the thread's current device, which need not be the model's."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def warm_up_next(self) -> None:
        """Capture one more bucket of decode steps. `step` does so, too, until all are there."""
        self._select_device()
        self.warming = self.runner.capture_next()

    def work_idly(self) -> None:
        """Do a few milliseconds of what spares later requests time."""
        if self.warming:
            self.warm_up_next()
        else:
            self.idle_work = self.runner.forward.touch_next()

    # ---------------------------------------------------------------- in

    def add(self, message: Add) -> None:
        """Queue a request. Raises `InvalidRequest`; nothing is queued then."""
        self._validate(message)
        params = message.params
        seed = random_seed() if params.seed is None else params.seed
        first = make_sequences(message, seed, self._arrivals, ngram=self.config.speculation_ngram)
        self._arrivals += 1
        self._delivery.requests[message.request] = [first, *first.children]
        if params.grammar is None:
            self.scheduler.add(first)
        else:
            self._grammars.add(first, params.grammar)

    def _validate(self, message: Add) -> None:
        prompt, params, width = message.prompt, message.params, self.model.logits_width
        if message.request in self._delivery.requests:
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
        for sequence in list(self._delivery.requests.get(request, ())):
            if choice is None or sequence.choice == choice:
                compiling = self._grammars.take(sequence)
                orphans = self._delivery.finish(sequence, "abort")
                if orphans and choice is not None:
                    orphans[0].children = orphans[1:]
                    if compiling is None:
                        self.scheduler.add(orphans[0])
                    else:
                        self._grammars.put(orphans[0], compiling)

    def abort_all(self) -> None:
        """Stop every request, at once."""
        for request in list(self._delivery.requests):
            self.abort(request)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens computed so far."""
        return self._delivery.prompt_tokens

    # ---------------------------------------------------------------- the step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None or bool(self._grammars)

    def step(self) -> list[Delta]:
        """Run the loop once; returns the news since the last call."""
        self._select_device()
        self._admit_compiled()
        began = time.perf_counter()
        step = self.scheduler.schedule()
        self.runner.phases["schedule"] += time.perf_counter() - began
        previous, self._in_flight = self._in_flight, None
        self._require_progress(step, previous)
        run = self._launch(step, previous)
        if run is not None:
            self._finish_step(run)
        self._steps += 1
        if self.warming:
            self.warm_up_next()
        return self._delivery.take()

    def _admit_compiled(self) -> None:
        """Queue the requests whose grammars are ready, refuse those whose can't be compiled (in time)."""
        patience_s = 0.0 if self.scheduler.has_work else GRAMMAR_WAIT_S
        for first, error in self._grammars.ready(patience_s):
            if error is None:
                self.scheduler.add(first)
            else:
                self._delivery.fail(first, str(error), invalid=isinstance(error, GrammarError))

    def _launch(self, step: Step, previous: Run | None) -> Run | None:
        """Start a step, then record the one before it. None when nothing runs now."""
        try:
            run = self.runner.launch(step) if step.chunks else None
            result = None if previous is None else self.runner.collect(previous)
        except Exception as error:
            self._recover(error, [step] if previous is None else [step, previous.step])
            return None
        if previous is not None and result is not None:
            self._record(previous, result)
        return run

    def _finish_step(self, run: Run) -> None:
        """Sample what waited for its grammars' masks; record the step now, or leave it to the next with overlap."""
        try:
            if run.inputs.constrained:
                self.runner.sample(run)
            if self.overlap and not self.scheduler.suspects:
                self._in_flight = run
                return
            result = self.runner.collect(run)
        except Exception as error:
            self._recover(error, [run.step])
            return
        self._record(run, result)

    def _require_progress(self, step: Step, previous: Run | None) -> None:
        """A loop that goes round without work is a bug of ours: better a crash and a restart than a hang."""
        idle = not step.chunks and previous is None and self.scheduler.has_work
        self._idle_steps = self._idle_steps + 1 if idle else 0
        if self._idle_steps > MOST_IDLE_STEPS:
            raise RuntimeError("the scheduler has work and schedules none of it")

    def _record(self, run: Run, result: Result) -> None:
        began = time.perf_counter()
        self._delivery.record(run, result)
        self.runner.phases["deliver"] += time.perf_counter() - began

    def _recover(self, error: Exception, steps: list[Step]) -> None:
        """Undo the steps under way; fail a sequence that raised alone, try the others one by one."""
        if isinstance(error, torch.AcceleratorError | RanksLost):
            raise error
        logger.error("a step failed", exc_info=error)
        alone = self.scheduler.suspects[0] if self.scheduler.suspects else None
        for step in steps:
            self.scheduler.rewind(step)
        if _out_of_memory(error) and self.scheduler.max_batch_tokens > SMALLEST_BATCH_TOKENS:
            self.scheduler.max_batch_tokens //= 2
            self.scheduler.quiet_tokens = 0
            self.scheduler.suspects.clear()
            return
        if alone is not None:
            self._delivery.fail(alone, f"the step failed: {type(error).__name__}")

    # ---------------------------------------------------------------- what it says of itself

    def ready(self) -> Ready:
        """The message that tells the front end all it needs."""
        model = self.model
        return Ready(
            tokenizer=model.tokenizer,
            logits_width=model.logits_width,
            max_context=self.runner.max_context,
            block_size=self.pool.block_size,
            num_blocks=self.pool.num_blocks,
            max_batch=self.config.max_batch,
            fingerprint=model.fingerprint,
            description=f"{model.description}; {self.runner.forward.name}",
            model_type=model.model_type,
            load_seconds=self.load_seconds,
        )

    def stats(self) -> Stats:
        scheduler, pool, delivery = self.scheduler, self.pool, self._delivery
        return Stats(
            step=self._steps,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=pool.used_blocks,
            cached_blocks=pool.cached_blocks,
            free_blocks=pool.free_blocks,
            prompt_tokens=delivery.prompt_tokens,
            cached_tokens=delivery.cached_tokens,
            generated_tokens=delivery.generated_tokens,
            preemptions=scheduler.preemptions,
            step_seconds=dict(self.runner.phases),
        )

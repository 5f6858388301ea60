"""Compile before the launches, in processes side by side: Triton's compiler holds Python's lock all the while.

    launches, none of which runs ─▶ what isn't in Triton's cache on disk ─▶ process │ process │ … ─▶ Triton's cache
    the same launches ─────────────────────────────────────────────────────── loaded in milliseconds ◀─┘

What is in the cache already is loaded on the way; the first kernel that isn't starts the processes, which never
touch a GPU. Whatever goes wrong here, a launch still compiles what it needs by itself.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any

import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tokenmill.kernels.gpu.jit import INTERPRETED
from tokenmill.kernels.gpu.offline import AbsentChip

logger = logging.getLogger("tokenmill.kernels")
MOST_PROCESSES = 16
FEWEST_PROCESSES = 3
"""With fewer cores the processes' own start costs what they save."""
PATIENCE_S = 240.0
"""For all of the compiling; then the launches do the rest."""


@dataclass(frozen=True, slots=True)
class Job:
    """One variant of a kernel, as Triton itself writes it down to make it again."""

    module: str
    name: str
    data: str


def compile_ahead(launches: Callable[[], object], processes: int | None = None) -> int:
    """Have everything compiled that `launches` launches; returns how many variants the processes were given.

    `launches` is called once, in this thread, and nothing that it launches runs: what kernels would have written
    is garbage to it. No more than `processes`; None takes the number of cores.
    """
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0))) if processes is None else processes
    if INTERPRETED or processes < FEWEST_PROCESSES:
        return 0
    target = driver.active.get_current_target()
    if target.backend != "cuda":
        return 0
    compilers = _Compilers(int(target.arch), processes)
    try:
        with _launches_recorded(compilers.add) as recorded:
            launches()
        compilers.finish()
    except Exception:
        logger.warning("not all kernels could be compiled ahead", exc_info=True)
    finally:
        compilers.close()
    for failure in compilers.failures:
        logger.warning("%s", failure)
    return len(recorded)


@contextmanager
def _launches_recorded(add: Callable[[Job], None]) -> Iterator[set[Job]]:
    """This thread's launches only load what Triton's cache has; from the first that it hasn't on they are added."""
    runtime, compilation, thread = triton.knobs.runtime, triton.knobs.compilation, threading.get_ident()
    run, hook, listener = JITFunction.run, runtime.jit_cache_hook, compilation.listener
    missing, recorded = False, set[Job]()

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        mine = threading.get_ident() == thread
        return run(self, *args, grid=grid, warmup=warmup or mine, **options)

    def leave_out(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        if not missing or threading.get_ident() != thread:
            return False
        job = Job(fn.module, fn.name, compile["specialization_data"])
        if job not in recorded:
            recorded.add(job)
            add(job)
        return True

    def notice(*, cache_hit: bool, **_: object) -> None:
        nonlocal missing
        missing |= not cache_hit

    JITFunction.run, runtime.jit_cache_hook, compilation.listener = only_compile, leave_out, notice
    try:
        yield recorded
    finally:
        JITFunction.run, runtime.jit_cache_hook, compilation.listener = run, hook, listener


@dataclass
class _Compilers:
    """Processes that fill Triton's cache, each fed by a thread of its own; started by the first job."""

    capability: int
    count: int
    failures: list[str] = field(default_factory=list)
    _jobs: SimpleQueue[Job | None] = field(default_factory=SimpleQueue)
    _threads: list[threading.Thread] = field(default_factory=list)
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def add(self, job: Job) -> None:
        self._jobs.put(job)
        if not self._threads:
            for _ in range(self.count):
                self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__, str(self.capability)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._processes.append(process)
        thread = threading.Thread(target=self._feed, args=(process,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _feed(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            while (job := self._jobs.get()) is not None:
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    self.failures.append(f"{job.name}: the process that compiled it ended")
                    return
                if failure := json.loads(answer):
                    self.failures.append(failure)
            process.stdin.close()

    def finish(self) -> None:
        """Wait until all jobs are done, but not for ever."""
        end = time.monotonic() + PATIENCE_S
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _compile(job: Job) -> str | None:
    """Compile one variant into Triton's cache, with what launches it; returns what went wrong."""
    try:
        kernel = getattr(importlib.import_module(job.module), job.name).preload(job.data)
    except Exception as error:  # the launch will say it again, where it belongs
        return f"{job.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    with suppress(Exception):  # Triton 3.6 calls a C compiler for each signature, later ones don't
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    return None


def main() -> None:
    """Compile what standard input asks for, one JSON line each, and answer each with a line."""
    driver.set_active(AbsentChip(int(sys.argv[1])))
    for line in sys.stdin:
        print(json.dumps(_compile(Job(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()

"""Sections of a GPU check in processes of their own, and their parts one by one.

    check ─▶ process of a section ─▶ part, part, part …        each part: a limit in seconds, its findings noted at once
                 │ crash, hang, a GPU that answers no more
                 └─▶ the same section again, without the parts that were begun

An error in a kernel can leave a process without its GPU, and a hang keeps it for ever: neither may cost the
sections that follow.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from tokenmill.bench import report
from tokenmill.bench.gpu_journal import Journal
from tokenmill.bench.gpu_models import Sizes
from tokenmill.bench.gpu_speed import CannotMeasure, Figure

if TYPE_CHECKING:
    import torch

    from tokenmill.bench.roofline import Limits

Value = TypeVar("Value")
RESERVE_S = 20.0
"""Seconds kept back for writing the results down."""
PROCESSES = 6
"""How often a section is begun, at most."""
LOST_GPU = 3
"""Exit code of a section whose GPU answers no more."""
COMPILE_S = 90.0
"""Seconds for having a section's kernels compiled before it, at most; what is missing then is compiled in it."""
TRACE = 1600
"""Characters of a traceback that are shown: the end, which says what and where."""


class Check:
    """One section's process: what it runs on, the time left, and where findings go."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        budget: float,
        seed: int,
        journal: Journal,
        *,
        own_process: bool = False,
    ) -> None:
        """`own_process`: a part past its limit ends this process, a lost GPU too."""
        self.device, self.sizes, self.seed = device, sizes, seed
        self.began, self.budget = time.monotonic(), budget
        self.journal = journal
        self.limits: Limits | None = None
        self._own_process = own_process
        self._begun = journal.begun()

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - RESERVE_S - (time.monotonic() - self.began)

    def attempt(
        self,
        name: str,
        work: Callable[[], object],
        *,
        needs: float = 5.0,
        limit: float = 120.0,
        again: bool = False,
    ) -> None:
        """Run one part if at least `needs` seconds are left; what it raises is a failure of this part alone.

        A part that an earlier process had begun isn't run again, unless it says `again`: others need it. Past
        `limit` seconds a process of its own shows where it stands, and ends.
        """
        if name in self._begun and not again:
            return
        if self.left < needs:
            self.journal.note("skipped", name=name)
            print(f"{name}: left out, {max(0.0, self.left):.0f} s are left", flush=True)
            return
        began = time.monotonic()
        self.journal.note("begun", name=name)
        if self._own_process:
            faulthandler.dump_traceback_later(limit, exit=True)
        try:
            work()
        except CannotMeasure as reason:
            self.journal.note("skipped", name=f"{name} ({reason})")
            print(f"{name}: skipped: {reason}", flush=True)
        except Exception as error:  # a part of a check that breaks is a finding, not the end of the check
            self._report(name, error)
        finally:
            if self._own_process:
                faulthandler.cancel_dump_traceback_later()
        self.journal.note("done", name=name, seconds=time.monotonic() - began)
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

    def value(self, name: str, make: Callable[[], Value], *, needs: float = 5.0) -> Value | None:
        """What a part makes that the others need, so that each process makes it again; None where it fails."""
        made: list[Value] = []
        self.attempt(name, lambda: made.append(make()), needs=needs, again=True)
        return made[0] if made else None

    def compile_ahead(self, section: str, launches: Callable[[], object]) -> None:
        """Have what `launches` will launch compiled by all cores at once, as a part of its own."""
        from tokenmill.kernels import gpu

        def work() -> None:
            print(
                f"  {gpu.compile_ahead(launches)} variants of kernels weren't in Triton's cache", flush=True
            )

        self.attempt(f"{section}: compiling ahead", work, limit=COMPILE_S)

    def _report(self, name: str, error: Exception) -> None:
        print("…" + "".join(traceback.format_exception(error, limit=-8))[-TRACE:], flush=True)
        self.fail(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if self._own_process and self._lost_gpu(error):
            self.journal.note("done", name=name, seconds=0.0)
            sys.stdout.flush()
            os._exit(LOST_GPU)

    def _lost_gpu(self, error: Exception) -> bool:
        """Whether the GPU answers no more. The error alone may not tell: Triton's has no type of its own."""
        import torch

        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            return True
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def fail(self, what: str) -> None:
        """Note something that isn't as it should be."""
        self.journal.note("failure", what=what)
        print(f"FAILED {what}", flush=True)

    def add(self, model: str, figure: Figure) -> None:
        """Note something measured."""
        self.journal.note("figure", model=model, **figure.fields())
        print("  " + "  ".join(cells(model, figure)), figure.note, flush=True)

    def row(self, section: str, fields: dict[str, Any]) -> None:
        """Note a line of a section's own table."""
        self.journal.note("row", section=section, **fields)


def cells(model: str, figure: Figure) -> list[str]:
    """A figure's line of the table."""
    digits = 0 if figure.unit == "tok/s" else 4
    lower_is_better = figure.limit is None
    met = ""
    if figure.target is not None:
        reached = figure.value <= figure.target if lower_is_better else figure.value >= figure.target
        met = "yes" if reached else "no"
    return [
        figure.name, model, report.number(figure.value, digits), figure.unit, report.number(figure.limit),
        report.percent(figure.share), report.number(figure.target, digits), met,
    ]  # fmt: skip


def supervise(
    section: str, command: Callable[[float], Sequence[str]], journal: Journal, budget: float
) -> None:
    """Run a section in processes of its own until all its parts were begun; at most `budget` seconds.

    `command(seconds)` is what to start, given the seconds that it may take.
    """
    end, broken = time.monotonic() + budget, set[str]()
    for _ in range(PROCESSES):
        left = end - time.monotonic()
        if left < RESERVE_S:
            journal.note("skipped", name=section)
            print(f"{section}: left out", flush=True)
            return
        code = _run(command(left), left)
        if code == 0:
            return
        if code == LOST_GPU:
            continue  # the part that lost it has said so
        stopped = set(journal.unfinished())
        for name in stopped or {section}:
            what = f"{name}: its process {_ending(code)} (the output says where it stood)"
            journal.note("failure", what=what)
        for name in stopped:
            journal.note("done", name=name, seconds=0.0)
        if not stopped or stopped & broken:
            return
        broken |= stopped
    journal.note("failure", what=f"{section}: given up after {PROCESSES} processes, parts of it never ran")


def _run(command: Sequence[str], limit: float) -> int | None:
    """The exit code of a process, which is killed with all that it started past `limit` seconds: None."""
    process = subprocess.Popen(command, process_group=0)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "took too long and was killed"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"

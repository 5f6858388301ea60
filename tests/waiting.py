"""Waiting for what happens elsewhere, in another thread or process, without a guess at how long it takes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 120.0
"""For what comes at once on an idle machine. On a busy one, only a fault takes so long."""
LOOK_S = 0.01


def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; fail when it never does.

    Looks are counted, not clocks read: while the tests themselves are stopped, nothing is late.
    """
    for _ in range(round(PATIENCE_S / LOOK_S)):
        if condition():
            return
        time.sleep(LOOK_S)
    raise AssertionError("it never came true")


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits for its parent doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """A process is stopped meanwhile; what it is sent waits for it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

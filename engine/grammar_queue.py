"""Requests whose grammars are being compiled: they join the scheduler's queue when those are ready."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from tokenmill.engine.grammar import GrammarCompiler, GrammarError, Matcher
from tokenmill.engine.request import Sequence
from tokenmill.engine.sampling_params import Grammar

COMPILE_SECONDS = 10.0
MOST_A_LOOK_S = 1.0
"""What one look adds at the most: a machine that slept meanwhile doesn't make a grammar a slow one."""


@dataclass
class Compiling:
    """A grammar on its way."""

    grammar: Grammar
    matcher: Future[Matcher]
    looked: float
    """When it was last seen that it isn't here yet, by the monotonic clock."""
    spent_s: float = 0.0
    """How long a compiler has been at it; the wait for one isn't the grammar's fault."""

    def is_late(self, now: float) -> bool:
        """Look again; whether it has taken too long."""
        if self.matcher.running():
            self.spent_s += min(now - self.looked, MOST_A_LOOK_S)
        self.looked = now
        return self.spent_s > COMPILE_SECONDS


class GrammarQueue:
    """First choices of requests, with their children behind them, that wait for a compiler."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._waiting: dict[Sequence, Compiling] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, first: Sequence, grammar: Grammar) -> None:
        """Begin to compile a request's grammar."""
        self._waiting[first] = Compiling(grammar, self._compiler.compile(grammar), time.monotonic())

    def take(self, first: Sequence) -> Compiling | None:
        """Forget a sequence; what it waited for, where it waited."""
        return self._waiting.pop(first, None)

    def put(self, first: Sequence, compiling: Compiling) -> None:
        """Let a sequence wait for what another one was taken from."""
        self._waiting[first] = compiling

    def ready(self, patience_s: float) -> Iterator[tuple[Sequence, BaseException | None]]:
        """Those that wait no longer: their choices have matchers, or there is an error (a `GrammarError`, if it is
        the request's own). Waits so long for the first of them."""
        if self._waiting:
            futures = [compiling.matcher for compiling in self._waiting.values()]
            wait(futures, timeout=patience_s, return_when=FIRST_COMPLETED)
        for first, compiling in list(self._waiting.items()):
            if compiling.matcher.done():
                del self._waiting[first]
                error = compiling.matcher.exception()
                if error is None:
                    self._start(first, compiling)
                yield first, error
            elif compiling.is_late(time.monotonic()):
                del self._waiting[first]
                yield first, GrammarError(f"the grammar took longer than {COMPILE_SECONDS:g} s to compile")

    def _start(self, first: Sequence, compiling: Compiling) -> None:
        matcher = compiling.matcher.result()
        self._compiler.remember(compiling.grammar, matcher)
        for sequence in [first, *first.children]:
            sequence.matcher = matcher.copy()

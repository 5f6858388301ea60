"""The engine process: `python -m tokenmill.engine.host --fd N`.

    reader thread ──inbox──▶ main thread: load, then step for ever ──outbox──▶ writer thread

The main thread never waits for the socket (`link.py`): the outbox merges deltas of the same choice while the
front end is slow. The front end watches `Stats`: they come at least every second from the step loop itself, so
silence means a hang. While it loads, a third thread says that it lives.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tokenmill.engine.garbage import leave_alone
from tokenmill.engine.lean_imports import import_transformers
from tokenmill.engine.link import Link, Outbox, leave, pulse, run_process
from tokenmill.engine.load_error import first_line
from tokenmill.engine.messages import (
    Abort,
    Add,
    Delta,
    Drain,
    LoadFailed,
    Loading,
    Outputs,
    Start,
    ToEngine,
    to_engine_decoder,
)
from tokenmill.kernels.cpu.ahead import Ahead

if TYPE_CHECKING:
    from tokenmill.engine.config import EngineConfig
    from tokenmill.engine.engine import Engine

logger = logging.getLogger("tokenmill.engine")
STATS_INTERVAL = 0.25
IDLE_WAIT = 1.0
NVIDIA = Path("/dev/nvidiactl")
"""Is there where a GPU can be used."""


class DeltaOutbox(Outbox):
    """What waits to be sent: messages in order, with the deltas of one choice merged while they wait."""

    def __init__(self) -> None:
        super().__init__()
        self._deltas: dict[tuple[int, int], Delta] = {}

    def put_deltas(self, deltas: list[Delta]) -> None:
        with self._condition:
            for delta in deltas:
                key = (delta.request, delta.choice)
                waiting = self._deltas.get(key)
                if waiting is None:
                    self._deltas[key] = delta
                else:
                    merge(waiting, delta)
            self._condition.notify()

    def _waiting(self) -> bool:
        return bool(self._deltas) or super()._waiting()

    def _taken(self) -> list[msgspec.Struct]:
        messages = super()._taken()
        if self._deltas:
            messages.append(Outputs(list(self._deltas.values())))
            self._deltas = {}
        return messages


def merge(first: Delta, second: Delta) -> None:
    """Append `second`, the later news of the same choice, to `first`."""
    first.token_ids = first.token_ids + second.token_ids
    if second.logprobs is not None and second.top is not None:
        first.logprobs = (first.logprobs or []) + second.logprobs
        first.top = (first.top or []) + second.top
    first.finish, first.stop_token = second.finish, second.stop_token
    first.error, first.invalid = second.error, second.invalid
    first.accepted_drafts += second.accepted_drafts
    first.rejected_drafts += second.rejected_drafts
    if second.cached_tokens is not None:
        first.cached_tokens = second.cached_tokens
    scores, more = first.prompt_logprobs, second.prompt_logprobs
    if scores is None:
        first.prompt_logprobs = more
    elif more is not None:
        scores.values = scores.values + more.values
        scores.top = scores.top + more.top


def wants_cpu_kernels(config: EngineConfig) -> bool:
    """Whether it will, as far as can be told before torch is imported."""
    if os.environ.get("TOKENMILL_KERNELS", "cpu") != "cpu":
        return False
    return config.device == "cpu" or (config.device == "auto" and not NVIDIA.exists())


class Host:
    """Joins the socket and the engine."""

    def __init__(self, connection: socket.socket) -> None:
        self._outbox = DeltaOutbox()
        self._link: Link[ToEngine] = Link(connection, to_engine_decoder, self._outbox)
        self._draining = False

    def run(self) -> int:
        """Serve until told to drain; returns the exit code."""
        self._link.start()
        start = self._link.inbox.get()
        if not isinstance(start, Start):
            logger.error("the first message must be Start")
            return 2
        ahead = Ahead() if wants_cpu_kernels(start.config) else None
        with pulse(self._outbox):
            engine = self._load(start)
        if engine is None and ahead is not None:
            ahead.stop()
        if engine is not None:
            self._serve(engine)
            engine.close()
        self._outbox.close()
        self._link.flush()
        return 0

    def _load(self, start: Start) -> Engine | None:
        try:
            if not start.config.compile:
                import_transformers()
            from tokenmill.engine.engine import Engine
            from tokenmill.engine.loader import LoadError

            try:
                engine = Engine(
                    start.config,
                    lambda stage, done: self._outbox.put(Loading(stage, done)),
                    own_process=True,
                )
            except LoadError as error:
                self._outbox.put(LoadFailed(str(error)))
                return None
        except Exception as error:
            logger.exception("loading %s failed", start.config.source)
            self._outbox.put(
                LoadFailed(f"{start.config.source}: {type(error).__name__}: {first_line(error)}")
            )
            return None
        self._outbox.put(engine.ready())
        self._outbox.put(engine.stats())
        leave_alone()
        return engine

    def _serve(self, engine: Engine) -> None:
        reported = time.monotonic()
        while True:
            self._take_messages(engine)
            if engine.has_work:
                self._outbox.put_deltas(engine.step())
            elif self._draining:
                self._outbox.put(engine.stats())
                return
            elif engine.idle_work:
                engine.work_idly()
            now = time.monotonic()
            if now - reported >= STATS_INTERVAL or not engine.has_work:
                self._outbox.put(engine.stats())
                reported = now

    def _take_messages(self, engine: Engine) -> None:
        busy = engine.has_work or engine.idle_work or self._draining
        for message in self._link.waiting(None if busy else IDLE_WAIT):
            if isinstance(message, Add):
                self._add(engine, message)
            elif isinstance(message, Abort):
                engine.abort(message.request, message.choice)
            elif isinstance(message, Drain):
                self._draining = True

    def _add(self, engine: Engine, message: Add) -> None:
        from tokenmill.engine.engine import InvalidRequest

        try:
            engine.add(message)
        except InvalidRequest as error:
            failed = [
                Delta(message.request, choice, [], finish="error", error=str(error), invalid=True)
                for choice in range(message.params.candidates)
            ]
            self._outbox.put_deltas(failed)


def main(argv: list[str] | None = None) -> int:
    """Entry of the engine process."""
    return run_process("tokenmill.engine.host", lambda connection: Host(connection).run(), argv)


if __name__ == "__main__":
    leave(main())

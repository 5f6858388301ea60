"""The engine process: `python -m tokenmill.engine.host --fd N`.

    reader thread ──inbox──▶ main thread: load, then step for ever ──outbox──▶ writer thread

The main thread never waits for the socket: the outbox merges deltas of the same choice while the front end is
slow. The process ends when the socket closes, whatever it is doing, and on Linux when its parent dies. The
front end watches `Stats`: they come at least every second from the step loop itself, so silence means a hang.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenmill.engine.garbage import leave_alone
from tokenmill.engine.lean_imports import import_transformers
from tokenmill.engine.messages import (
    HEADER,
    MAX_FRAME,
    Abort,
    Add,
    Delta,
    Drain,
    FromEngine,
    LoadFailed,
    Loading,
    Outputs,
    Start,
    ToEngine,
    encode_frame,
    to_engine_decoder,
)

if TYPE_CHECKING:
    from tokenmill.engine.engine import Engine

logger = logging.getLogger("tokenmill.engine")
STATS_INTERVAL = 0.25
IDLE_WAIT = 1.0
PR_SET_PDEATHSIG = 1


class Outbox:
    """What waits to be sent: messages in order, with the deltas of one choice merged while they wait."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._messages: list[FromEngine] = []
        self._deltas: dict[tuple[int, int], Delta] = {}
        self._closed = False

    def put(self, message: FromEngine) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

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

    def close(self) -> None:
        """Send what is there, then let the writer end."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self) -> list[FromEngine]:
        """All that waits; blocks until there is something, and returns nothing once closed and empty."""
        with self._condition:
            while not (self._messages or self._deltas or self._closed):
                self._condition.wait()
            messages, self._messages = self._messages, []
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


class Host:
    """Joins the socket, its two threads and the engine."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._draining = False
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)

    def run(self) -> int:
        """Serve until told to drain; returns the exit code."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._writer.start()
        start = self._inbox.get()
        if not isinstance(start, Start):
            logger.error("the first message must be Start")
            return 2
        engine = self._load(start)
        if engine is not None:
            self._serve(engine)
            engine.close()
        self._outbox.close()
        self._writer.join(timeout=5)
        return 0

    def _load(self, start: Start) -> Engine | None:
        try:
            if not start.config.compile:
                import_transformers()
            from tokenmill.engine.engine import Engine
            from tokenmill.engine.loader import LoadError

            try:
                engine = Engine(start.config, lambda stage, done: self._outbox.put(Loading(stage, done)))
            except LoadError as error:
                self._outbox.put(LoadFailed(str(error)))
                return None
        except Exception as error:
            logger.exception("loading %s failed", start.config.source)
            self._outbox.put(LoadFailed(f"{start.config.source}: {type(error).__name__}: {_one_line(error)}"))
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
        for message in self._waiting_messages(
            block=not (engine.has_work or engine.idle_work or self._draining)
        ):
            if isinstance(message, Add):
                self._add(engine, message)
            elif isinstance(message, Abort):
                engine.abort(message.request, message.choice)
            elif isinstance(message, Drain):
                self._draining = True

    def _waiting_messages(self, *, block: bool) -> Iterator[ToEngine]:
        try:
            yield self._inbox.get(block=block, timeout=IDLE_WAIT)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

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

    # ---------------------------------------------------------------- the socket's threads

    def _read(self) -> None:
        """Put each frame into the inbox; end the process when the front end is gone."""
        try:
            self._read_frames()
        except OSError:  # a socket that is closed with news unread is reset
            os._exit(0)

    def _read_frames(self) -> None:
        stream = self._connection.makefile("rb")
        while True:
            header = stream.read(HEADER.size)
            if len(header) < HEADER.size:
                os._exit(0)
            (length,) = HEADER.unpack(header)
            if length > MAX_FRAME:
                logger.error("a frame of %d bytes is over the limit", length)
                os._exit(2)
            frame = stream.read(length)
            if len(frame) < length:
                os._exit(0)
            self._inbox.put(to_engine_decoder.decode(frame))

    def _write(self) -> None:
        while messages := self._outbox.take():
            try:
                self._connection.sendall(b"".join(encode_frame(message) for message in messages))
            except OSError:
                os._exit(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the front end dies; elsewhere the closed socket does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: list[str] | None = None) -> int:
    """Entry of the engine process: `--fd` is its end of the socketpair."""
    parser = argparse.ArgumentParser(prog="tokenmill.engine.host")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Host(socket.socket(fileno=arguments.fd)).run()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)

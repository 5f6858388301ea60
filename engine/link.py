"""A process of the server's: its end of the socket, and how it comes to its end.

    reader thread ──inbox──▶ main thread ──outbox──▶ writer thread

The main thread never waits for the socket. The process ends when the socket closes, whatever it is doing, and on
Linux when its parent dies.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import msgspec

from tokenmill.engine.messages import HEADER, MAX_FRAME, Alive, encode_frame

logger = logging.getLogger("tokenmill.engine")
FLUSH_S = 5.0
BEAT_S = 0.5
"""Between two signs of life."""
PR_SET_PDEATHSIG = 1

Incoming = TypeVar("Incoming")


class Source(Protocol):
    """Where the writer finds what is to be sent."""

    def take(self) -> Sequence[msgspec.Struct]:
        """All that waits; blocks until there is something, and returns nothing once closed and empty."""


class Outbox:
    """What waits to be sent, in order."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._messages: list[msgspec.Struct] = []
        self._closed = False

    def put(self, message: msgspec.Struct) -> None:
        with self._condition:
            self._messages.append(message)
            self._condition.notify()

    def close(self) -> None:
        """Send what is there, then let the writer end."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def take(self) -> list[msgspec.Struct]:
        """All that waits; blocks until there is something, and returns nothing once closed and empty."""
        with self._condition:
            while not (self._waiting() or self._closed):
                self._condition.wait()
            return self._taken()

    def _waiting(self) -> bool:
        return bool(self._messages)

    def _taken(self) -> list[msgspec.Struct]:
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def pulse(outbox: Outbox) -> Iterator[None]:
    """Inside the block a thread says that the process lives, whatever keeps the main thread.

    Only what holds Python's lock silences it. Reading and converting weights let go of it; the longest silence
    of a load is the linker's, while it maps torch's libraries (a fifth of a second from memory).
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            outbox.put(Alive())

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Link(Generic[Incoming]):
    """The socket's two threads and the inbox between the reader and the main thread."""

    def __init__(
        self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[Incoming], outbox: Source
    ) -> None:
        self._connection = connection
        self._decoder = decoder
        self._outbox = outbox
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)

    def start(self) -> None:
        """Begin to read and write."""
        threading.Thread(target=self.read, name="reader", daemon=True).start()
        self._writer.start()

    def flush(self) -> None:
        """Wait until a closed outbox is sent, for a moment at most."""
        self._writer.join(timeout=FLUSH_S)

    def waiting(self, timeout_s: float | None) -> Iterator[Incoming]:
        """All messages that are here. Where there is none, waits so long for one (None: not at all)."""
        try:
            yield self.inbox.get(block=timeout_s is not None, timeout=timeout_s)
            while True:
                yield self.inbox.get_nowait()
        except queue.Empty:
            return

    def read(self) -> None:
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
            self.inbox.put(self._decoder.decode(frame))

    def _write(self) -> None:
        while messages := self._outbox.take():
            try:
                self._connection.sendall(b"".join(encode_frame(message) for message in messages))
            except OSError:
                os._exit(0)


def _die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the front end dies; elsewhere the closed socket does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_process(name: str, serve: Callable[[socket.socket], int], argv: list[str] | None = None) -> int:
    """Entry of a process: `--fd` is its end of the socketpair, which `serve` is given. Returns its exit code."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return serve(socket.socket(fileno=arguments.fd))


def leave(code: int) -> None:
    """End the process now: nothing that a library left running is waited for."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)

"""The front end's end of the socket to an engine process: frames in and out, deltas to whom they concern."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from typing import Protocol, cast

from tokenmill.engine.messages import (
    HEADER,
    MAX_FRAME,
    Abort,
    Add,
    Delta,
    FromEngine,
    Outputs,
    ToEngine,
    encode_frame,
    from_engine_decoder,
)

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Who waits for the deltas of one request."""

    def on_delta(self, delta: Delta, now: float) -> None:
        """News of a choice; `now` is the monotonic time of its arrival."""

    def on_engine_lost(self, reason: str) -> None:
        """No more deltas will come: the engine is gone."""


class Listener(Protocol):
    """Who supervises the engine."""

    def on_message(self, message: FromEngine) -> None:
        """Anything but outputs; outputs as well, as a sign of life, after their sinks have them."""

    def on_lost(self, reason: str) -> None:
        """The socket is closed."""


class EngineClient(asyncio.Protocol):
    """Speaks for one engine process. Lives on the event loop's thread alone."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ids = itertools.count(1)
        self._sinks: dict[int, Sink] = {}
        self.lost: str | None = None
        """Why the engine is gone, once it is."""

    async def connect(self, connection: socket.socket) -> None:
        """Take over a connected socket. Messages may come before this returns."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=connection)

    def new_id(self) -> int:
        """An id for an `Add`. Never a client's choosing."""
        return next(self._ids)

    def add(self, message: Add, sink: Sink) -> None:
        """Hand a request to the engine. `Sink` hears of it until `forget`."""
        self._sinks[message.request] = sink
        self._send(message)

    def abort(self, request: int, choice: int | None = None) -> None:
        """Stop a choice, or (None) a whole request, which is forgotten as well."""
        if choice is None:
            self._sinks.pop(request, None)
        self._send(Abort(request, choice))

    def forget(self, request: int) -> None:
        """The request has ended by itself."""
        self._sinks.pop(request, None)

    def close(self, reason: str = "the model's engine is restarted") -> None:
        """Close the socket: the engine process ends at once. `reason` is for those who wait for deltas."""
        self.lost = self.lost or reason
        if self._transport is not None:
            self._transport.abort()

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            if length > MAX_FRAME:
                logger.error("the engine sent a frame of %d bytes; closing its socket", length)
                self.close()
                return
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            self._receive(from_engine_decoder.decode(memoryview(buffer)[start + HEADER.size : end]))
            start = end
        if start:
            del buffer[:start]

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            now = time.monotonic()
            for delta in message.deltas:
                sink = self._sinks.get(delta.request)
                if sink is not None:
                    sink.on_delta(delta, now)
        self._listener.on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = self.lost or "the model's engine stopped"
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_engine_lost(self.lost)
        self._listener.on_lost(self.lost)

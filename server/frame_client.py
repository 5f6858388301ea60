"""The front end's end of a process's socket: frames in and out, on the event loop's thread alone."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from tokenmill.engine.messages import HEADER, MAX_FRAME, encode_frame

logger = logging.getLogger(__name__)


class Awaiting(Protocol):
    """Who waits for what a process makes for one id."""

    def on_process_lost(self, reason: str) -> None:
        """No more will come: the process is gone."""


Heard = TypeVar("Heard", contravariant=True)
Message = TypeVar("Message")
Sink = TypeVar("Sink", bound=Awaiting)


class Listener(Protocol[Heard]):
    """Who supervises the process."""

    def on_message(self, message: Heard) -> None:
        """Anything; what sinks wait for as well, as a sign of life, after they have it."""

    def on_lost(self, reason: str) -> None:
        """The socket is closed."""


class FrameClient(asyncio.Protocol, ABC, Generic[Message, Sink]):
    """Speaks for one process. What its frames, of type `Message`, mean is the subclass's."""

    def __init__(self, listener: Listener[Message]) -> None:
        self._listener = listener
        self._sinks: dict[int, Sink] = {}
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ids = itertools.count(1)
        self.lost: str | None = None
        """Why the process is gone, once it is."""

    async def connect(self, connection: socket.socket) -> None:
        """Take over a connected socket. Messages may come before this returns."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=connection)

    def new_id(self) -> int:
        """An id for what the process is to work on. Never a client's choosing."""
        return next(self._ids)

    def close(self, reason: str = "the model's engine is restarted") -> None:
        """Close the socket: the process ends at once. `reason` is for those who wait for it."""
        self.lost = self.lost or reason
        if self._transport is not None:
            self._transport.abort()

    def _send(self, message: msgspec.Struct) -> None:
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
            # A copy: an exception that a sink keeps keeps its callers' variables, and a bytearray of which there is
            # a view can't be resized.
            self._on_frame(bytes(memoryview(buffer)[start + HEADER.size : end]))
            start = end
        if start:
            del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = self.lost or "the model's engine stopped"
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_process_lost(self.lost)
        self._listener.on_lost(self.lost)

    @abstractmethod
    def _on_frame(self, payload: bytes) -> None:
        """One message has come."""

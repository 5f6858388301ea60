"""The front end's end of the socket to an engine process: deltas to whom they concern."""

from __future__ import annotations

import time
from typing import Protocol

from tokenmill.engine.messages import Abort, Add, Delta, FromEngine, Outputs, from_engine_decoder
from tokenmill.server.frame_client import FrameClient


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


class EngineClient(FrameClient):
    """Speaks for one engine process."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._sinks: dict[int, Sink] = {}

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

    def _on_frame(self, payload: memoryview) -> None:
        message = from_engine_decoder.decode(payload)
        if isinstance(message, Outputs):
            now = time.monotonic()
            for delta in message.deltas:
                sink = self._sinks.get(delta.request)
                if sink is not None:
                    sink.on_delta(delta, now)
        self._listener.on_message(message)

    def _on_lost(self, reason: str) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_engine_lost(reason)
        self._listener.on_lost(reason)

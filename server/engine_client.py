"""The front end's end of the socket to an engine process: deltas to whom they concern."""

from __future__ import annotations

import time
from typing import Protocol

from tokenmill.engine.messages import Abort, Add, Delta, FromEngine, Outputs, from_engine_decoder
from tokenmill.server.frame_client import Awaiting, FrameClient


class DeltaSink(Awaiting, Protocol):
    """Who waits for the deltas of one request."""

    def on_delta(self, delta: Delta, now: float) -> None:
        """News of a choice; `now` is the monotonic time of its arrival."""


class EngineClient(FrameClient[FromEngine, DeltaSink]):
    """Speaks for one engine process."""

    def add(self, message: Add, sink: DeltaSink) -> None:
        """Hand a request to the engine. `sink` hears of it until `forget`, or `abort` of the whole."""
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

    def _on_frame(self, payload: bytes) -> None:
        message = from_engine_decoder.decode(payload)
        if isinstance(message, Outputs):
            now = time.monotonic()
            for delta in message.deltas:
                sink = self._sinks.get(delta.request)
                if sink is not None:
                    sink.on_delta(delta, now)
        self._listener.on_message(message)

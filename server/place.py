"""One request's place with a model: how full the model is, and which engine the request holds."""

from __future__ import annotations

from typing import Protocol


class Held(Protocol):
    """What a place holds on to: a loaded engine, or a voice."""

    requests: int
    """Places that were given it and are held."""


class Crowd(Protocol):
    """What counts its places."""

    queued: int
    started: int

    def on_release(self) -> None:
        """A place that held an engine is free."""


class Place:
    """One request's place: in the queue until its first token, in the batch until it is released."""

    def __init__(self, model: Crowd) -> None:
        self._model = model
        self._waiting = True
        self._held = True
        self._engine: Held | None = None
        model.queued += 1

    def enter(self, engine: Held) -> None:
        """The engine that serves it, which isn't ended before the place is released."""
        self._engine = engine
        engine.requests += 1

    def start(self) -> None:
        """The first token is there."""
        if self._waiting and self._held:
            self._waiting = False
            self._model.queued -= 1
            self._model.started += 1

    def release(self) -> None:
        """The request has ended. May be called twice."""
        if self._held:
            self._held = False
            if self._waiting:
                self._model.queued -= 1
            else:
                self._model.started -= 1
            if self._engine is not None:
                self._engine.requests -= 1
                self._model.on_release()

"""One model: its engine under supervision, and what the front end counts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import FromEngine, LoadFailed, Loading, Ready, Start, Stats
from tokenmill.server.engine_client import EngineClient
from tokenmill.server.engine_process import ENGINE_COMMAND, EngineProcess
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.metrics import ModelMetrics
from tokenmill.server.supervised import Rules, Supervised
from tokenmill.server.voice import Voice

Progress = Callable[[str, Loading | Ready | LoadFailed], None]


class Model(Supervised[EngineClient, Engine]):
    """Keeps one engine as it should be, and lets requests in when it is."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        rules: Rules,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        process: EngineProcess | None = None,
        progress: Progress | None = None,
        voice: Voice | None = None,
    ) -> None:
        super().__init__(name, rules, config.max_batch, process)
        self.config = config
        self.voice = voice
        """What speaks its answers, if anything does."""
        self.stats: Stats | None = None
        self.metrics = ModelMetrics()
        self._command = command
        self._progress = progress

    def _spawn(self) -> EngineProcess:
        return EngineProcess.spawn(Start(self.config), self._command)

    def _new_client(self) -> EngineClient:
        return EngineClient(self)

    def on_message(self, message: FromEngine) -> None:
        """Anything from the engine; outputs only as a sign of life."""
        self._on_sign_of_life(message)
        match message:
            case Stats():
                self.stats = message
            case Ready():
                self._on_engine_ready(message)
            case LoadFailed():
                self._on_load_failed(message)
                self._report(message)
            case Loading():
                self._report(message)

    def on_lost(self, reason: str) -> None:
        """The engine is gone."""
        self.stats = None
        super().on_lost(reason)

    def _on_engine_ready(self, ready: Ready) -> None:
        assert self._client is not None
        if self._leaving:
            return
        try:
            engine = Engine(self._client, ready)
        except ValueError as error:
            failed = LoadFailed(str(error))
            self._on_load_failed(failed)
            self._report(failed)
            self._client.close()
            return
        self._on_ready(engine)
        self._report(ready)

    def _report(self, message: Loading | Ready | LoadFailed) -> None:
        if self._progress is not None:
            self._progress(self.name, message)

"""What speaks the answers of an entry's models: its speech checkpoint's process under supervision."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from tokenmill.engine.config import SpeechConfig
from tokenmill.engine.messages import FromSpeech, LoadFailed, SpeechReady, StartSpeech
from tokenmill.server.engine_process import SPEECH_COMMAND, EngineProcess
from tokenmill.server.speech_client import LoadedVoice, SpeechClient
from tokenmill.server.supervised import Rules, Supervised

logger = logging.getLogger(__name__)


class Voice(Supervised[SpeechClient, LoadedVoice]):
    """Keeps one speech process as it should be. It is loaded with its entry's model or when first asked for."""

    def __init__(
        self, name: str, config: SpeechConfig, rules: Rules, command: Sequence[str] = SPEECH_COMMAND
    ) -> None:
        # Lazy, so that one that was unloaded with its model comes back by itself.
        super().__init__(f"{name}:speech", msgspec.structs.replace(rules, lazy=True), batch=1)
        self.config = config
        self._at_start = not rules.lazy
        self._command = command

    async def supervise(self) -> None:
        """Run until cancelled, loading it first where its model is loaded at the start."""
        if self._at_start:
            self.prepare()
        await super().supervise()

    def describe(self) -> dict[str, object]:
        """What a row of `GET /v1/models` says of it."""
        row: dict[str, object] = {"status": self.status}
        voice = self.engine
        if voice is not None:
            row |= {"voices": voice.ready.voices, "formats": voice.ready.formats}
        if self.reason is not None:
            row["reason"] = self.reason
        return row

    def _spawn(self) -> EngineProcess:
        return EngineProcess.spawn(StartSpeech(self.config), self._command)

    def _new_client(self) -> SpeechClient:
        return SpeechClient(self)

    def on_message(self, message: FromSpeech) -> None:
        """Anything from the process; sound only as a sign of life."""
        self._on_sign_of_life(message)
        match message:
            case SpeechReady():
                self._on_speech_ready(message)
            case LoadFailed():
                self._on_load_failed(message)

    def _on_speech_ready(self, ready: SpeechReady) -> None:
        assert self._client is not None
        if not self._leaving:
            logger.info("%s: ready after %.1f s (%s)", self.name, ready.load_seconds, ready.description)
            self._on_ready(LoadedVoice(self._client, ready))

"""The front end's end of the socket to a speech process: sound to the clips that it belongs to."""

from __future__ import annotations

from typing import Protocol

from tokenmill.engine.messages import FromSpeech, Hush, Say, SpeechReady, Spoken, from_speech_decoder
from tokenmill.server.frame_client import Awaiting, FrameClient


class ClipSink(Awaiting, Protocol):
    """Who waits for the sound of one clip."""

    def on_spoken(self, spoken: Spoken) -> None:
        """The next bytes."""


class SpeechClient(FrameClient[FromSpeech, ClipSink]):
    """Speaks with one speech process."""

    def say(self, message: Say, sink: ClipSink) -> None:
        """Hand over a piece of a clip's text. `sink` hears of the clip until its last bytes or `hush`."""
        self._sinks[message.clip] = sink
        self._send(message)

    def hush(self, clip: int) -> None:
        """Stop a clip, and forget it."""
        self._sinks.pop(clip, None)
        self._send(Hush(clip))

    def _on_frame(self, payload: bytes) -> None:
        message = from_speech_decoder.decode(payload)
        if isinstance(message, Spoken):
            sink = self._sinks.pop(message.clip, None) if message.last else self._sinks.get(message.clip)
            if sink is not None:
                sink.on_spoken(message)
        self._listener.on_message(message)


class LoadedVoice:
    """A loaded speech checkpoint as the front end sees it: its socket, and what it said about itself."""

    def __init__(self, client: SpeechClient, ready: SpeechReady) -> None:
        self.client = client
        self.ready = ready
        self.requests = 0
        """Places that were given it and are held."""

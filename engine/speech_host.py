"""The speech process: `python -m tokenmill.engine.speech_host --fd N`. One checkpoint that speaks.

Its front end watches `Alive`. They come from a thread while it loads, from the loop while it idles, and from within
the model's own code while it makes an utterance, which may take many seconds: each of its modules that is called is a
sign of life.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING, Any

from tokenmill.engine.garbage import leave_alone
from tokenmill.engine.lean_imports import import_transformers
from tokenmill.engine.link import BEAT_S, Link, Outbox, leave, pulse, run_process
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.messages import (
    Alive,
    Hush,
    LoadFailed,
    Loading,
    Say,
    StartSpeech,
    ToSpeech,
    to_speech_decoder,
)

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from tokenmill.engine.speech_clips import Clips

logger = logging.getLogger("tokenmill.engine")


class SpeechHost:
    """Joins the socket and the clips."""

    def __init__(self, connection: socket.socket) -> None:
        self._outbox = Outbox()
        self._link: Link[ToSpeech] = Link(connection, to_speech_decoder, self._outbox)
        self._beaten = 0.0
        self._hook: RemovableHandle | None = None
        """Calls `_beat` for each module that is called."""

    def run(self) -> int:
        """Serve until the socket closes; returns an exit code where it couldn't begin."""
        self._link.start()
        start = self._link.inbox.get()
        if not isinstance(start, StartSpeech):
            logger.error("the first message must be StartSpeech")
            return 2
        with pulse(self._outbox):
            clips = self._load(start)
        if clips is not None:
            self._serve(clips)
        self._outbox.close()
        self._link.flush()
        return 0

    def _load(self, start: StartSpeech) -> Clips | None:
        try:
            import_transformers()
            from torch.nn.modules.module import register_module_forward_pre_hook

            from tokenmill.engine.speech import load_speech
            from tokenmill.engine.speech_clips import Clips

            loaded = load_speech(start.config, lambda stage, done: self._outbox.put(Loading(stage, done)))
        except LoadError as error:
            self._outbox.put(LoadFailed(str(error)))
            return None
        except Exception as error:
            logger.exception("loading %s failed", start.config.source)
            reason = f"{start.config.source}: {type(error).__name__}: {first_line(error)}"
            self._outbox.put(LoadFailed(reason))
            return None
        self._hook = register_module_forward_pre_hook(self._beat)
        self._outbox.put(loaded.ready)
        leave_alone()
        return Clips(loaded.speaker, loaded.names)

    def _serve(self, clips: Clips) -> None:
        while True:
            for message in self._link.waiting(None if clips.has_work else BEAT_S):
                if isinstance(message, Say):
                    clips.say(message)
                elif isinstance(message, Hush):
                    clips.hush(message.clip)
            spoken = clips.step()
            if spoken is not None:
                self._outbox.put(spoken)
            self._beat()

    def _beat(self, *_: Any) -> None:
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            self._outbox.put(Alive())


def main(argv: list[str] | None = None) -> int:
    """Entry of the speech process."""
    return run_process("tokenmill.engine.speech_host", lambda connection: SpeechHost(connection).run(), argv)


if __name__ == "__main__":
    leave(main())

"""The clips that a speech process works on: one utterance at a time, the clips in turn.

    Say ─▶ utterances ─▶ speaker ─▶ samples ─▶ pcm16: bytes at once     other formats: a file at the clip's end

So a long answer doesn't hold up a short one, and a clip that is called off costs the utterance at hand at most.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tokenmill.engine.audio_files import encode
from tokenmill.engine.messages import Say, Spoken
from tokenmill.engine.resample import Samples
from tokenmill.engine.utterances import Utterances

if TYPE_CHECKING:
    from tokenmill.engine.speech import Speaker

logger = logging.getLogger("tokenmill.engine")

PAUSE_S = 0.12
"""Silence between two utterances."""
SILENCE_S = 0.1
"""What a clip without anything that can be spoken becomes: players stumble over files without samples."""


class Clip:
    """One text on its way to sound."""

    def __init__(self, say: Say) -> None:
        self.say = say
        """Its first piece, with voice, format and seed."""
        self.waiting: deque[str] = deque()
        self.ended = False
        """Whether its text is complete."""
        self.utterances = 0
        """How many were spoken."""
        self.parts: list[Samples] = []
        """Samples that no bytes were made of yet."""
        self.silent = True
        self._cutter = Utterances()

    def add(self, say: Say) -> None:
        """The next piece of the text."""
        self.waiting += self._cutter.push(say.text)
        if say.last:
            self.waiting += self._cutter.finish()
            self.ended = True

    @property
    def due(self) -> bool:
        """Whether there is something to speak, or the end to write."""
        return bool(self.waiting) or self.ended

    def next_seed(self) -> int | None:
        """Each utterance's own seed; None where the clip has none."""
        self.utterances += 1
        if not self.say.seed:
            return None
        digest = hashlib.blake2b(f"{self.say.seed}/{self.utterances}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


class Clips:
    """All clips of a process. `step` speaks one utterance."""

    def __init__(self, speaker: Speaker, names: Mapping[str, str]) -> None:
        self._speaker = speaker
        self._names = names
        self._clips: dict[int, Clip] = {}
        """In the order of their turns."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return any(clip.due for clip in self._clips.values())

    def say(self, message: Say) -> None:
        """Take in a piece of a text."""
        clip = self._clips.get(message.clip)
        if clip is None:
            clip = self._clips[message.clip] = Clip(message)
        clip.add(message)

    def hush(self, clip: int) -> None:
        """Forget a clip."""
        self._clips.pop(clip, None)

    def step(self) -> Spoken | None:
        """Work on the clip whose turn it is; what the front end is told of it."""
        number = next((number for number, clip in self._clips.items() if clip.due), None)
        if number is None:
            return None
        clip = self._clips.pop(number)
        try:
            data = self._advance(clip)
        except Exception as error:  # one text that a checkpoint can't bear must not end the others
            logger.exception("an utterance of %d characters failed", len(clip.say.text))
            return Spoken(number, b"", last=True, error=f"{type(error).__name__}")
        if clip.due and not clip.waiting:
            return Spoken(number, data + self._end(clip), last=True)
        self._clips[number] = clip
        return Spoken(number, data) if data else None

    def _advance(self, clip: Clip) -> bytes:
        """Speak the next utterance, if there is one; the bytes that are ready with it."""
        if not clip.waiting:
            return b""
        voice = self._names[clip.say.voice] if clip.say.voice else next(iter(self._names.values()))
        samples = self._speaker.speak(clip.waiting.popleft(), voice, clip.next_seed())
        if not len(samples):
            return b""
        if not clip.silent:
            clip.parts.append(self._silence(PAUSE_S))
        clip.silent = False
        clip.parts.append(samples)
        return self._take(clip) if clip.say.format == "pcm16" else b""

    def _end(self, clip: Clip) -> bytes:
        """What is left when all utterances are spoken."""
        if clip.silent:
            clip.parts.append(self._silence(SILENCE_S))
        return self._take(clip) if clip.parts else b""

    def _take(self, clip: Clip) -> bytes:
        parts, clip.parts = clip.parts, []
        return encode(np.concatenate(parts), self._speaker.sample_rate, clip.say.format)

    def _silence(self, seconds: float) -> Samples:
        return np.zeros(round(seconds * self._speaker.sample_rate), np.float32)

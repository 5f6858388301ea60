"""What one request has spoken: a clip for each choice that has text.

    text of a choice ──say──▶ speech process ──▶ on_spoken ──▶ Clip ──▶ the answer (`spoken_answer.py`)

The generation counts as unfinished while clips of its choices are (`Generation.awaited`), so that whoever waits for
its news also waits for theirs.
"""

from __future__ import annotations

import logging
import secrets
import time

from tokenmill.engine.messages import AudioFormat, Say, Spoken
from tokenmill.server.errors import ApiError, ClientGone, bad_request, internal_error, unavailable
from tokenmill.server.generation import Generation
from tokenmill.server.place import Place
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.speech_client import LoadedVoice
from tokenmill.server.voice import Voice

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 16_384
"""Of all choices of an answer: some twenty minutes. It bounds the memory that a request can take."""
MAX_UNSENT_BYTES = 8 << 20
"""Sound that may wait for a client that doesn't read; past it, the request is aborted."""
WHOLE = 6
"""Bytes of pcm16 that are whole samples as well as whole groups of base64: pieces may be joined either way."""
SHOWN_VOICES = 12


class Clip:
    """The sound of one choice: the sink of its process' news."""

    def __init__(self, speech: Speech, number: int, stream: int) -> None:
        self.id = f"audio_{secrets.token_hex(12)}"
        self.number = number
        """The process knows it by this."""
        self.stream = stream
        """The choice's place among those of its prompt: each has seeds of its own."""
        self.text_ended = False
        self.ended = False
        """Whether all of its bytes have come."""
        self._data = bytearray()
        self._speech = speech

    def take(self) -> bytes:
        """The bytes that nobody has taken yet, up to where they may be cut."""
        end = len(self._data) if self.ended else len(self._data) // WHOLE * WHOLE
        data = bytes(self._data[:end])
        del self._data[:end]
        return data

    @property
    def size(self) -> int:
        """Bytes that wait to be taken."""
        return len(self._data)

    def on_spoken(self, spoken: Spoken) -> None:
        """The next bytes of it."""
        self._data += spoken.data
        self.ended = spoken.last
        self._speech.on_news(spoken)

    def on_process_lost(self, reason: str) -> None:
        """No more will come."""
        self._speech.on_lost(reason)


class Speech:
    """The clips of one request. `close` it whatever happens: it takes back what is still being spoken."""

    def __init__(
        self, request: CompletionRequest, voice: LoadedVoice, place: Place, speaker: str, form: AudioFormat
    ) -> None:
        self.clips: dict[int, Clip] = {}
        """By the choice's index."""
        self._request = request
        self._voice = voice
        self._place = place
        self._speaker = speaker
        self._form = form
        self._characters = 0
        self._generation: Generation

    def join(self, generation: Generation) -> None:
        """The generation whose choices are spoken."""
        self._generation = generation

    def say(self, index: int, text: str) -> Clip:
        """A piece of a choice's text. Raises `ApiError` 400 when it is more than can be spoken."""
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            message = f"the answer is longer than the {MAX_CHARACTERS} characters that are spoken at the most"
            raise bad_request(f"{message}; lower max_tokens or n", "modalities", "audio_too_long")
        clip = self.clips.get(index)
        if clip is None:
            clip = Clip(self, self._voice.client.new_id(), index % self._request.n)
            self.clips[index] = clip
            self._generation.awaited += 1
        self._send(clip, text, last=False)
        return clip

    def end(self, index: int) -> None:
        """A choice's text is complete."""
        clip = self.clips[index]
        clip.text_ended = True
        self._send(clip, "", last=True)

    def _send(self, clip: Clip, text: str, last: bool) -> None:
        client = self._voice.client
        if client.lost is not None:
            raise _down(client.lost)
        seed = "" if self._request.seed is None else f"{self._request.seed}/{clip.stream}"
        client.say(Say(clip.number, text, last, self._speaker, self._form, seed), clip)

    def on_news(self, spoken: Spoken) -> None:
        """A clip has more bytes, or has failed."""
        generation = self._generation
        self._place.start()
        if spoken.error is not None:
            logger.error("%s: speaking it failed: %s", generation.name, spoken.error)
            generation.guard.interrupt(internal_error(generation.name))
        elif generation.blocked and sum(clip.size for clip in self.clips.values()) > MAX_UNSENT_BYTES:
            generation.guard.interrupt(ClientGone("the client doesn't read its stream"))
        generation.awaited -= spoken.last
        generation.wake()

    def on_lost(self, reason: str) -> None:
        """The process is gone."""
        self._generation.guard.interrupt(_down(reason))

    def close(self) -> None:
        """Stop what is still being spoken, and give the place back."""
        for clip in self.clips.values():
            # One that failed may have text on its way, which the process would take for a new one.
            if not (clip.ended and clip.text_ended):
                self._voice.client.hush(clip.number)
        self._place.release()

    @staticmethod
    def expiry() -> int:
        """Until when clients may name a clip instead of repeating its transcript: none is kept."""
        return int(time.time())


def check_voice(request: CompletionRequest, name: str, voice: Voice | None) -> None:
    """Raises `ApiError` 400 where the model that has this name is to speak and can't."""
    if request.speaks and voice is None:
        raise bad_request(f"{name} can't speak", "modalities", "unsupported_modality")


async def open_speech(request: CompletionRequest, name: str, voice: Voice | None) -> Speech | None:
    """What will speak the answer; None where only text is wanted. `name` is the model's.

    Raises `ApiError`: 400 where the model has no speech, or not this voice or format; 429; 503.
    """
    check_voice(request, name, voice)
    if voice is None or not request.speaks:
        return None
    place = voice.admit()
    try:
        loaded = await voice.acquire(place)
        speaker, form = _choose(request, name, loaded)
    except BaseException:
        place.release()
        raise
    return Speech(request, loaded, place, speaker, form)


def _choose(request: CompletionRequest, name: str, loaded: LoadedVoice) -> tuple[str, AudioFormat]:
    """Voice and format, as asked for or as usual. Raises `ApiError` 400."""
    wanted, known = request.audio, loaded.ready
    speaker = (wanted.voice if wanted is not None else None) or known.voices[0]
    if speaker not in known.voices:
        shown = (
            known.voices if len(known.voices) <= SHOWN_VOICES else [*known.voices[: SHOWN_VOICES - 1], "…"]
        )
        message = f"audio: {name} has no voice {speaker[:80]!r}; it has {', '.join(shown)}"
        raise bad_request(message, "audio", "unknown_voice")
    form: AudioFormat = "pcm16" if request.stream else "wav"
    if wanted is not None and wanted.format is not None:
        form = wanted.format
    if form not in known.formats:
        message = (
            f"audio: {form} can't be written on this machine: its server lacks the package soundfile "
            f"(pip install 'tokenmill[speech]'); {', '.join(known.formats)} can"
        )
        raise bad_request(message, "audio", "unsupported_format")
    return speaker, form


def _down(reason: str) -> ApiError:
    return unavailable(f"the answer can't be spoken: {reason}", "speech_down", 1)

"""A speech checkpoint behind one small interface, whatever its type: text and voice in, samples out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenmill.engine.audio_files import known_formats
from tokenmill.engine.checkpoint import Checkpoint, resolve
from tokenmill.engine.config import SpeechConfig
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import pick_device
from tokenmill.engine.messages import SpeechReady
from tokenmill.engine.model_class import read_config
from tokenmill.engine.model_size import in_words
from tokenmill.engine.progress import Progress
from tokenmill.engine.resample import Samples
from tokenmill.engine.speech_vits import load_vits


class Speaker(Protocol):
    """A loaded checkpoint."""

    sample_rate: int
    """Hz."""
    voices: list[str]
    """Names of its voices, the default first."""
    parameters: int

    def speak(self, text: str, voice: str, seed: int | None) -> Samples:
        """One utterance as [samples] within about -1..1; none where nothing in it can be spoken.

        Equal texts, voices and seeds sound the same; without a seed each time is another.
        """


SHOWN = 12
"""Voices that a message names."""
Loader = Callable[[Checkpoint, torch.device, Progress], Speaker]

LOADERS: dict[str, Loader] = {"vits": load_vits}
"""The types that can be spoken with: those whose checkpoint holds all that a text needs to become a signal."""


@dataclass(frozen=True)
class LoadedSpeech:
    """A speaker, and what the front end is told of it."""

    speaker: Speaker
    ready: SpeechReady
    names: dict[str, str]
    """Voices of the checkpoint by the names that a request may say."""


def load_speech(config: SpeechConfig, progress: Progress) -> LoadedSpeech:
    """Load `config.source`; raises LoadError with one line that says what stands in the way."""
    begun = time.monotonic()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    progress("finding the speech checkpoint", None)
    checkpoint = resolve(config.source, config.revision, progress)
    try:
        model_type = _model_type(checkpoint)
        device = pick_device(config.device)
        speaker = LOADERS[model_type](checkpoint, device, progress)
        names = _names(speaker.voices, config.voices)
    except LoadError as error:
        raise LoadError(f"{config.source}: {error}") from None
    size = f"{in_words(speaker.parameters)} parameters"
    ready = SpeechReady(
        voices=list(names),
        formats=known_formats(),
        sample_rate=speaker.sample_rate,
        description=f"{model_type}, {size}, {speaker.sample_rate} Hz on {device}",
        model_type=model_type,
        load_seconds=time.monotonic() - begun,
    )
    return LoadedSpeech(speaker, ready, names)


def _model_type(checkpoint: Checkpoint) -> str:
    known = ", ".join(LOADERS)
    if checkpoint.gguf_file is not None:
        raise LoadError(f"speech comes from a folder or a Hub id, not from a GGUF file (types: {known})")
    model_type = read_config(checkpoint.folder).model_type
    if model_type not in LOADERS:
        raise LoadError(
            f"a {model_type} can't be spoken with here; speech checkpoints are of the type {known}"
        )
    return model_type


def _names(voices: list[str], further: dict[str, str]) -> dict[str, str]:
    """Voices by name: the given names first, then the checkpoint's own."""
    for name, voice in further.items():
        if voice not in voices:
            raise LoadError(
                f"voices: {name} stands for the voice {voice}, which isn't among {listed(voices)}"
            )
    return {**further, **{voice: voice for voice in voices if voice not in further}}


def listed(voices: list[str]) -> str:
    """Voices for a message: all of few, the ends of many."""
    return ", ".join(voices if len(voices) <= SHOWN else [*voices[: SHOWN - 2], "…", voices[-1]])

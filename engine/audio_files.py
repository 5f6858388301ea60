"""Samples to bytes in the formats that a request may ask for.

`wav` and `pcm16` are written here; `flac`, `mp3` and `opus` (in an Ogg file) by libsndfile, where the package
soundfile is installed.
"""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np

from tokenmill.engine.messages import PCM16_RATE, AudioFormat
from tokenmill.engine.resample import Samples, resample

OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
PACKED: dict[AudioFormat, tuple[str, str, tuple[int, ...]]] = {
    "flac": ("FLAC", "PCM_16", ()),
    "mp3": ("MP3", "MPEG_LAYER_III", MP3_RATES),
    "opus": ("OGG", "OPUS", OPUS_RATES),
}
"""libsndfile's names of container and codec, and the rates that the codec takes (none: any)."""
BLOCK = 1 << 14
"""Samples that libsndfile is given at once: some codecs keep a block on the stack."""


def known_formats() -> list[AudioFormat]:
    """The formats that can be written on this machine."""
    formats: list[AudioFormat] = ["wav", "pcm16"]
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is here, its library isn't
        return formats
    here = soundfile.available_formats()
    packed = [
        name
        for name, (container, codec, _) in PACKED.items()
        if container in here and codec in soundfile.available_subtypes(container)
    ]
    return [*formats, *packed]


def encode(signal: Samples, rate: int, wanted: AudioFormat) -> bytes:
    """The whole of a clip, `signal` [n] of `rate` Hz, as a file; pcm16 has no header and goes at `PCM16_RATE`."""
    if wanted == "pcm16":
        return _pcm16(resample(signal, rate, PCM16_RATE)).tobytes()
    if wanted == "wav":
        return _wav(signal, rate)
    return _packed(signal, rate, wanted)


def _pcm16(signal: Samples) -> np.ndarray[Any, np.dtype[np.int16]]:
    """16-bit little-endian samples; what lies outside of -1..1 is clipped, what is no number is silence."""
    whole = np.nan_to_num(signal, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.round(np.clip(whole, -1.0, 1.0) * 32767).astype("<i2")


def _wav(signal: Samples, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(_pcm16(signal).tobytes())
    return file.getvalue()


def _packed(signal: Samples, rate: int, wanted: AudioFormat) -> bytes:
    import soundfile

    container, codec, rates = PACKED[wanted]
    if rates and rate not in rates:
        chosen = min((x for x in rates if x >= rate), default=rates[-1])
        signal, rate = resample(signal, rate, chosen), chosen
    samples = _pcm16(signal)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, codec, format=container) as writer:
        for start in range(0, len(samples), BLOCK):
            writer.write(samples[start : start + BLOCK])
    return file.getvalue()

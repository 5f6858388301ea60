"""Samples as files: what a player reads back is what was said."""

from __future__ import annotations

import io
import sys
import wave

import numpy as np
import pytest
import soundfile

from tokenmill.engine.audio_files import encode, known_formats
from tokenmill.engine.messages import PCM16_RATE, AudioFormat
from tokenmill.engine.resample import Samples


def tone(rate: int, seconds: float = 0.5) -> Samples:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def strongest(signal: Samples, rate: int) -> float:
    """The frequency that stands out, in Hz."""
    return float(np.abs(np.fft.rfft(signal)).argmax() * rate / len(signal))


def test_wav_has_the_rate_of_the_samples() -> None:
    with wave.open(io.BytesIO(encode(tone(16000), 16000, "wav"))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.abs(samples / 32767 - tone(16000)).max() < 1e-4


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100])
def test_pcm16_is_at_its_rate(rate: int) -> None:
    samples = np.frombuffer(encode(tone(rate), rate, "pcm16"), "<i2")
    assert len(samples) == PCM16_RATE // 2
    assert abs(strongest(samples.astype(np.float32), PCM16_RATE) - 440) < 3


def test_loud_and_broken_samples_are_clipped() -> None:
    signal = np.array([0.0, 1.0, -1.0, 7.0, -7.0, np.nan, np.inf, -np.inf], np.float32)
    samples = np.frombuffer(encode(signal, PCM16_RATE, "pcm16"), "<i2")
    assert samples.tolist() == [0, 32767, -32767, 32767, -32767, 0, 32767, -32767]


@pytest.mark.parametrize("form", ["flac", "mp3", "opus"])
@pytest.mark.parametrize(
    ("rate", "mp3_rate", "opus_rate"), [(16000, 16000, 16000), (22050, 22050, 24000), (96000, 48000, 48000)]
)
def test_packed_formats_are_read_back(form: AudioFormat, rate: int, mp3_rate: int, opus_rate: int) -> None:
    data = encode(tone(rate), rate, form)
    expected = {"flac": ("FLAC", rate), "mp3": ("MP3", mp3_rate), "opus": ("OGG", opus_rate)}[form]
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        # An Opus decoder may give any of its rates; libsndfile gives the one that the header names.
        assert (file.format, file.samplerate, file.channels) == (*expected, 1)
        signal = file.read(dtype="float32")
    assert abs(len(signal) / expected[1] - 0.5) < 0.08
    assert abs(strongest(signal, expected[1]) - 440) < 8


def test_flac_loses_nothing() -> None:
    with wave.open(io.BytesIO(encode(tone(22050), 22050, "wav"))) as file:
        exact = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    read, _ = soundfile.read(io.BytesIO(encode(tone(22050), 22050, "flac")), dtype="int16")
    assert np.array_equal(read, exact)


def test_all_formats_are_known_where_the_library_is() -> None:
    assert known_formats() == ["wav", "pcm16", "flac", "mp3", "opus"]


def test_two_formats_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert known_formats() == ["wav", "pcm16"]

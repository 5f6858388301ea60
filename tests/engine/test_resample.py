"""Resampling: the same sound at another rate, nothing above the new band."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine import resample as module
from tokenmill.engine.resample import Samples, resample

RATES = [(16000, 24000), (22050, 24000), (44100, 24000), (24000, 16000), (22050, 48000), (8000, 24000)]


def tone(hertz: float, rate: int, seconds: float = 0.25) -> Samples:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.mark.parametrize(("rate", "wanted"), RATES)
@pytest.mark.parametrize("hertz", [0.0, 100.0, 1000.0, 3300.0])
def test_a_tone_stays_what_it_was(rate: int, wanted: int, hertz: float) -> None:
    made, expected = resample(tone(hertz, rate), rate, wanted), tone(hertz, wanted)
    assert len(made) == len(expected) or abs(len(made) - len(expected)) == 1
    inner = slice(wanted // 50, -wanted // 50)
    assert np.abs(made[: len(expected)] - expected[: len(made)])[inner].max() < 1e-3


def test_a_constant_stays_what_it_was() -> None:
    made = resample(np.ones(4000, np.float32), 22050, 24000)
    assert np.abs(made[200:-200] - 1).max() < 1e-5


@pytest.mark.parametrize(("rate", "wanted", "hertz"), [(48000, 24000, 14000.0), (24000, 16000, 9000.0)])
def test_what_the_new_rate_cannot_hold_is_left_out(rate: int, wanted: int, hertz: float) -> None:
    made = resample(tone(hertz, rate), rate, wanted)
    assert np.abs(made[wanted // 50 : -wanted // 50]).max() < 1e-3


@given(length=st.integers(0, 300), pair=st.sampled_from(RATES))
def test_lengths_and_order(length: int, pair: tuple[int, int]) -> None:
    rate, wanted = pair
    signal = np.zeros(length, np.float32)
    signal[-1:] = 1.0
    made = resample(signal, rate, wanted)
    assert made.dtype == np.float32
    assert len(made) == ceil(length * wanted / rate)
    if length > 50:
        assert abs(np.abs(made).argmax() / wanted - (length - 1) / rate) <= 1 / wanted


def test_chunks_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    signal = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    whole = resample(signal, 22050, 24000)
    monkeypatch.setattr(module, "CHUNK", 37)
    assert np.array_equal(resample(signal, 22050, 24000), whole)


def test_the_same_rate_is_the_same_signal() -> None:
    signal = tone(100, 16000)
    assert resample(signal, 16000, 16000) is signal

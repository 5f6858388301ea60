"""A signal at another sampling rate: band-limited interpolation by a windowed sinc, in numpy.

    y[i] = Σ_k x[k] · h(i·from/to − k)        h: a sinc at the lower rate's band, under a Kaiser window

`i·from/to` has as many fractional parts as `to` has steps after division by the greatest common divisor, so the
values of h are tabled once: [phases, taps]. (The method is Smith's "Digital Audio Resampling", CCRMA.)
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

ZERO_CROSSINGS = 24
"""Of the sinc on each side of its peak."""
KAISER_BETA = 8.6
"""Stop band about 90 dB down."""
ROLL_OFF = 0.94
"""Where the pass band ends, as a share of the lower rate's half."""
CHUNK = 1 << 16
"""Output samples that are made at once: bounds the memory."""


def resample(signal: Samples, rate: int, wanted: int) -> Samples:
    """`signal` [n] of `rate` Hz as [ceil(n · wanted / rate)] of `wanted` Hz."""
    if rate == wanted or not len(signal):
        return signal
    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    table = _table(up, down)
    taps = table.shape[1]
    half = taps // 2
    padded = np.concatenate([np.zeros(half - 1), signal, np.zeros(half + 1)]).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
    length = ceil(len(signal) * up / down)
    result = np.empty(length, np.float32)
    for start in range(0, length, CHUNK):
        places = np.arange(start, min(start + CHUNK, length)) * down
        result[start : start + CHUNK] = np.einsum("ij,ij->i", windows[places // up], table[places % up])
    return result


@lru_cache(maxsize=8)
def _table(up: int, down: int) -> Samples:
    """Weights [up, taps] of the samples around a place, for each of its fractional parts."""
    band = ROLL_OFF * min(1.0, up / down)
    half = ceil(ZERO_CROSSINGS / band)
    offsets = np.arange(1 - half, half + 1)
    distances = np.arange(up)[:, None] / up - offsets[None, :]
    window = np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (distances / half) ** 2, 0, None))) / np.i0(KAISER_BETA)
    weights = band * np.sinc(band * distances) * window
    # Each row adds up to one, so that a constant stays what it was.
    normalised: Samples = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised

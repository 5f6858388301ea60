"""The counter noise of `reference.gumbel_noise` inside a kernel: hash to the bit, floats nearly so."""

from __future__ import annotations

from tokenmill.kernels.gpu.jit import jit, tl


@jit
def noise_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The 64-bit key of a row's noise: splitmix64 of int64 `seed` and `position`, as uint64."""
    z = seed.to(tl.uint64) + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def gumbel(key: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise of `tokens` [n] under a row's `key`, float32 [n].

    -log(1 - v) for small v is 2 artanh(v / (2 - v)), summed as a series: there is no log1p here, and log
    itself would lose v's digits.
    """
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    hashed = _mix(_mix(tokens.to(tl.uint32) ^ low) + high)
    upper = hashed >= 0x80000000
    part = (tl.where(upper, hashed ^ 0xFFFFFFFF, hashed).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    s = part / (2.0 - part)
    square = s * s
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return -tl.log(tl.where(upper, -tl.log(part), 2.0 * s * series))

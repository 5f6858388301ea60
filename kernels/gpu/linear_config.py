"""Tile shapes and the split of K for each weight shape: a fixed table, so that sums never change order.

A skinny matmul is a race to keep bytes in flight: on an H200 4.3 TB/s times 0.8 µs, some 3.4 MB over the chip
or 26 KB a multiprocessor. So a program has four stages of at least 8 KB on their way, and what is left to
choose is a number of programs that fills the chip evenly. A small model of that time chooses; what was
measured on the chip, entered in `MEASURED`, takes precedence. The constants are the H200's wherever the code
runs, so that the split of K, and with it each sum, is the same on every chip.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tokenmill.kernels.gpu.jit import ceil_div

_MULTIPROCESSORS = 132
_SHARED_BYTES = 227 * 1024
_BANDWIDTH = 4.3e12  # bytes a second
_LATENCY = 0.8e-6  # seconds from a load to its data, under load
_FOLD = 1.5e-6  # seconds that folding partial sums adds
_BUFFERS = 4
_ROWS_BYTES = 16 * 2  # a tile's rows of bfloat16, an input


@dataclass(frozen=True)
class LinearConfig:
    """How the weight [out, in] is cut: outputs and inputs a tile, splits of K, launch settings."""

    block_n: int
    block_k: int
    splits: int
    stages: int
    warps: int


MEASURED: dict[tuple[int, int, bool, int], LinearConfig] = {}
"""(outputs, inputs, gated, bits a weight) → the configuration that was fastest on the chip."""


def wide_config(tile_rows: int, gated: bool) -> LinearConfig:
    """The configuration for tiles of 64 or 128 rows, where the matrix units are the limit: for all shapes."""
    if tile_rows == 64:
        return LinearConfig(32 if gated else 64, 64, 1, 3, 4)
    return LinearConfig(64 if gated else 128, 64, 1, 4, 8)


def linear_config(outputs: int, inputs: int, gated: bool, bits: int) -> LinearConfig:
    """The configuration for few rows and `outputs` columns; a gated weight has twice that many rows."""
    measured = MEASURED.get((outputs, inputs, gated, bits))
    return measured or _modelled(outputs, inputs, gated, bits)


def stages_that_fit(config: LinearConfig, block_k: int, rows_bytes: int, bits: int) -> int:
    """The stages that a multiprocessor has room for, `config.stages` at the most; sums don't depend on them.

    `rows_bytes` an input for a tile's rows, `bits` a weight, twice that of a gated one. float32 rows beside float32
    or 8-bit weights take more than the table counts on.
    """
    stage = block_k * (rows_bytes + config.block_n * bits // 8)
    return min(config.stages, 1 + _SHARED_BYTES // stage)


@functools.cache
def _modelled(outputs: int, inputs: int, gated: bool, bits: int) -> LinearConfig:
    """The candidate with the least predicted time; among equals the first."""
    return min(candidates(inputs, bits), key=lambda config: _predicted(config, outputs, inputs, gated, bits))


def candidates(inputs: int, bits: int) -> list[LinearConfig]:
    """What there is to choose among; each split has at least four tiles of K."""
    tiles = ((16, 256), (32, 256), (32, 128), (64, 128)) if bits >= 16 else ((16, 256), (32, 256), (64, 256))
    return [
        LinearConfig(block_n, block_k, splits, _BUFFERS + 1, 4)
        for splits in (1, 2, 4, 8)
        for block_n, block_k in tiles
        if splits == 1 or ceil_div(inputs, block_k) >= 4 * splits
    ]


def _predicted(config: LinearConfig, outputs: int, inputs: int, gated: bool, bits: int) -> float:
    """Seconds: full rounds of resident programs, then the rest, each bound by bandwidth or by latency."""
    bits = bits * 2 if gated else bits
    stage = config.block_k * (config.block_n * bits // 8)
    shared = _BUFFERS * (stage + config.block_k * _ROWS_BYTES)
    resident = _MULTIPROCESSORS * max(1, min(8, _SHARED_BYTES // shared))
    programs = ceil_div(outputs, config.block_n) * config.splits
    work = config.block_n * bits / 8 * inputs / config.splits

    def round_of(count: int) -> float:
        rate = min(_BANDWIDTH, count * _BUFFERS * stage / _LATENCY)
        return count * work / rate + _LATENCY if count else 0.0

    seconds = programs // resident * round_of(resident) + round_of(programs % resident)
    return seconds + (_FOLD if config.splits > 1 else 0.0)

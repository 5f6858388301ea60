"""The least time of a piece of work."""

from __future__ import annotations

import pytest

from tokenmill.bench.roofline import (
    Footprint,
    Limits,
    Work,
    decode_seconds,
    flops_per_byte,
    least_seconds,
    prefill_seconds,
)

LIMITS = Limits("cpu", "bfloat16", read_bytes_per_s=100.0, matmul_flops_per_s=10_000.0)
DENSE = Footprint(weight_bytes=50.0, weights=25.0, kv_bytes_per_token=2.0)


def test_one_request_by_hand() -> None:
    work = Work([(4, 3)], batch=1)
    # Three steps read the weights, and 4 + 5 + 6 cached tokens.
    assert decode_seconds(LIMITS, DENSE, work) == pytest.approx((3 * 50 + 15 * 2) / 100)
    assert prefill_seconds(LIMITS, DENSE, work) == pytest.approx(4 * 2 * 25 / 10_000)
    assert least_seconds(LIMITS, DENSE, work) == pytest.approx(1.82)


def test_a_batch_shares_the_weights_but_not_the_cache() -> None:
    alone, together = Work([(4, 3)] * 8, batch=1), Work([(4, 3)] * 8, batch=8)
    assert (alone.decode_steps, together.decode_steps) == (24, 3)
    saved = decode_seconds(LIMITS, DENSE, alone) - decode_seconds(LIMITS, DENSE, together)
    assert saved == pytest.approx(21 * 50 / 100)


def test_the_longest_request_bounds_the_steps() -> None:
    assert Work([(1, 100), (1, 2), (1, 2)], batch=3).decode_steps == 100
    assert Work([(1, 4)] * 5, batch=2).decode_steps == 10


def test_arithmetic_takes_over_in_large_batches() -> None:
    work = Work([(1, 1)] * 1000, batch=1000)
    no_cache = Footprint(weight_bytes=50.0, weights=25.0, kv_bytes_per_token=0.0)
    assert decode_seconds(LIMITS, no_cache, work) == pytest.approx(1000 * 50 / 10_000)
    assert flops_per_byte(no_cache, work) == pytest.approx(1000)


def test_a_mixture_reads_the_experts_that_are_met() -> None:
    mixture = Footprint(10.0, 5.0, 0.0, expert_bytes=80.0, expert_weights=40.0, expert_share=0.25)
    assert mixture.read_bytes(1) == pytest.approx(10 + 20)
    assert mixture.read_bytes(2) == pytest.approx(10 + 80 * (1 - 0.75**2))
    assert mixture.read_bytes(1000) == pytest.approx(90)
    assert mixture.flops_per_token == pytest.approx(2 * (5 + 10))

"""Percentiles of measurements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.bench.distribution import Distribution, describe, median, percentile

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values, st.floats(0, 100))
def test_percentile_equals_numpys(numbers: list[float], percent: float) -> None:
    expected = float(np.percentile(numbers, percent))
    assert percentile(sorted(numbers), percent) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(values)
def test_describe_is_ordered(numbers: list[float]) -> None:
    found = describe(iter(numbers))
    assert found.count == len(numbers)
    assert min(numbers) <= found.p50 <= found.p90 <= found.p99 <= found.largest == max(numbers)
    assert found.mean == pytest.approx(float(np.mean(numbers)), rel=1e-9, abs=1e-6)


def test_nothing_measured() -> None:
    assert describe([]) == Distribution()
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0]) == 2.5

"""What many measurements of one thing come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles, in the unit of what was measured; all zero when nothing was."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    largest: float = 0.0


def describe(values: Iterable[float]) -> Distribution:
    """The distribution of `values`."""
    ordered = sorted(values)
    if not ordered:
        return Distribution()
    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        largest=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of ascending values, linear between the two nearest. Raises ValueError without any."""
    if not ordered:
        raise ValueError("no values, no percentile")
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    between = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return min(between, ordered[above])  # rounding may carry it past


def median(values: Iterable[float]) -> float:
    """The middle value."""
    return percentile(sorted(values), 50)

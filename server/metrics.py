"""Counters and histograms by model, in Prometheus' text format. One front-end thread, so no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenmill.engine.messages import Stats

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Counts of observations up to each bound; the last count is for those above all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `times` observations of the same value, in seconds."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class ModelMetrics:
    """What the front end itself sees of one model's requests."""

    __slots__ = ("inter_token", "outcomes", "request", "time_to_first_token")

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        """Requests by outcome: an HTTP status, 499 for a client that left."""
        self.time_to_first_token = Histogram(TTFT_BUCKETS)
        self.inter_token = Histogram(ITL_BUCKETS)
        self.request = Histogram(REQUEST_BUCKETS)


class Snapshot(NamedTuple):
    """One model at the time of a scrape."""

    name: str
    loaded: bool
    queued: int
    stats: Stats | None
    metrics: ModelMetrics


_GAUGES = {
    "running": "Sequences in the running batch.",
    "waiting": "Sequences waiting for a place in the batch.",
    "used_blocks": "KV blocks held by sequences.",
    "cached_blocks": "Free KV blocks whose content can be reused.",
    "free_blocks": "KV blocks that no sequence holds.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens taken on.",
    "cached_tokens": "Prompt tokens that came from the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "preemptions": "Sequences that lost their blocks and were computed again.",
}


def render(models: Iterable[Snapshot]) -> str:
    """The `/metrics` page, in Prometheus' text format 0.0.4."""
    rows = list(models)
    lines: list[str] = []
    _family(
        lines, "model_loaded", "gauge", "Whether the model is loaded.", [(m, "", int(m.loaded)) for m in rows]
    )
    queued = [(m, "", m.queued) for m in rows]
    _family(lines, "requests_without_token", "gauge", "Requests that have no token yet.", queued)
    alive = [(m, m.stats) for m in rows if m.stats is not None]
    for name, text in _GAUGES.items():
        _family(lines, name, "gauge", text, [(m, "", getattr(stats, name)) for m, stats in alive])
    for name, text in _COUNTERS.items():
        _family(
            lines, f"{name}_total", "counter", text, [(m, "", getattr(stats, name)) for m, stats in alive]
        )
    seconds = [(m, f',phase="{p}"', value) for m, stats in alive for p, value in stats.step_seconds.items()]
    _family(lines, "step_seconds_total", "counter", "Time of the engine's steps, by phase.", seconds)
    outcomes = [
        (m, f',outcome="{o}"', count) for m in rows for o, count in sorted(m.metrics.outcomes.items())
    ]
    _family(lines, "requests_total", "counter", "Requests by outcome (an HTTP status).", outcomes)
    _histograms(lines, "time_to_first_token", "From a request's arrival to its first token.", rows)
    _histograms(lines, "inter_token", "Between the tokens of one choice.", rows)
    _histograms(lines, "request", "From a request's arrival to the end of its answer, errors left out.", rows)
    return "\n".join(lines) + "\n"


def _family(
    lines: list[str], name: str, kind: str, text: str, rows: Sequence[tuple[Snapshot, str, float]]
) -> None:
    lines += [f"# HELP tokenmill_{name} {text}", f"# TYPE tokenmill_{name} {kind}"]
    lines += [f'tokenmill_{name}{{model="{model.name}"{labels}}} {value}' for model, labels, value in rows]


def _histograms(lines: list[str], attribute: str, text: str, models: list[Snapshot]) -> None:
    name = f"{attribute}_seconds"
    lines += [f"# HELP tokenmill_{name} {text}", f"# TYPE tokenmill_{name} histogram"]
    for model in models:
        histogram: Histogram = getattr(model.metrics, attribute)
        label = f'model="{model.name}"'
        below = 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            below += count
            lines.append(f'tokenmill_{name}_bucket{{{label},le="{bound}"}} {below}')
        lines.append(f"tokenmill_{name}_sum{{{label}}} {histogram.total}")
        lines.append(f"tokenmill_{name}_count{{{label}}} {below}")

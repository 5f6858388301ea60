"""`tokenmill bench throughput`: how many tokens a second the engine makes in this process, by batch size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tokenmill.bench import report, session
from tokenmill.bench.distribution import describe, median
from tokenmill.bench.offline import PHASES, Run
from tokenmill.bench.options import integers, positive
from tokenmill.bench.report import Point, Report, number, percent
from tokenmill.bench.roofline import Work, flops_per_byte, least_seconds
from tokenmill.bench.session import Session

COLUMNS = ("batch", "requests", "output tok/s", "limit", "share", "prefill tok/s", "decode tok/s", "step ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--batch", type=integers, default=[1, 8, 32], metavar="N,N", help="requests at once (default 1,8,32)"
    )
    parser.add_argument(
        "--requests", type=positive, metavar="N", help="requests a batch size (default: as many, 4 at least)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="the median counts (default 3)"
    )
    session.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure each batch size and publish the result."""
    opened = session.open_session(args, batch=max(args.batch))
    points = []
    accounts = []
    for batch in args.batch:
        measured = measure(opened, batch, args.requests or max(4, batch), args.rounds, args.seed)
        middle = middle_run(measured)
        points.append(as_point(opened, middle, measured))
        accounts.append(middle)
    print(report.table(COLUMNS, [_cells(point) for point in points]))
    print("\nWhere a step's time went:")
    print(report.table(("batch", *PHASES, "elsewhere"), [phase_cells(account) for account in accounts]))
    result = Report(
        command="tokenmill bench throughput",
        settings=session.settings_row(args, opened, load="batch"),
        points=points,
        limits=opened.limits,
        footprint=opened.footprint,
    )
    report.publish(result, args)
    return 0


def measure(opened: Session, batch: int, requests: int, rounds: int, seed: int) -> list[Run]:
    """Run `requests` jobs, at most `batch` at once, `rounds` times, each time with other prompts."""
    from tqdm import tqdm

    jobs = [opened.work.jobs(requests, seed=seed * 1_000_003 + batch * 1009 + turn) for turn in range(rounds)]
    total = sum(job.output_tokens for turn in jobs for job in turn)
    with tqdm(total=total, unit="tok", desc=f"batch {batch}", leave=False, disable=None) as bar:
        return [opened.driver.run(turn, batch, bar.update) for turn in jobs]


def middle_run(runs: Sequence[Run]) -> Run:
    """The run whose output rate is the median one (of an even number, the slower of the middle two)."""
    ordered = sorted(runs, key=lambda run: run.output_tokens / run.seconds)
    return ordered[(len(ordered) - 1) // 2]


def as_point(opened: Session, middle: Run, runs: Sequence[Run]) -> Point:
    """The result of one batch size: rates of its middle run, latencies over all of them."""
    work = Work(middle.lengths, middle.batch)
    timelines = [timeline for run in runs for timeline in run.timelines]
    return Point(
        series="tokenmill, in process",
        load=middle.batch,
        output_per_s=middle.output_tokens / middle.seconds,
        latencies={
            "TTFT": describe(1e3 * timeline.first for timeline in timelines),
            "ITL": describe(1e3 * gap for timeline in timelines for gap in timeline.gaps),
            "E2E": describe(1e3 * timeline.whole for timeline in timelines),
        },
        limit=work.output_tokens / least_seconds(opened.limits, opened.footprint, work),
        intensity=flops_per_byte(opened.footprint, work),
        extra={
            "requests": len(middle.timelines),
            "rounds_output_tokens_per_s": [run.output_tokens / run.seconds for run in runs],
            "prefill_tokens_per_s": _rate(middle.prompt_tokens, middle.prefill_seconds),
            "decode_tokens_per_s": _rate(middle.decode_tokens, middle.decode_seconds),
            "decode_step_ms": 1e3 * median(middle.decode_steps) if middle.decode_steps else None,
            "seconds": middle.seconds,
            "phase_seconds": middle.phases,
        },
    )


def phase_cells(run: Run) -> list[str]:
    """The share of the wall time that each phase took; what no phase accounts for is elsewhere."""
    seconds = [run.phases[name] for name in PHASES]
    shares = [part / run.seconds for part in (*seconds, run.seconds - sum(seconds))]
    return [str(run.batch), *(f"{100 * share:.1f}%" for share in shares)]


def _cells(point: Point) -> list[str]:
    extra = point.extra
    return [
        f"{point.load:g}",
        str(extra["requests"]),
        number(point.output_per_s),
        number(point.limit),
        percent(point.share),
        *(number(value, digits) for value, digits in _rates(point)),
    ]


def _rates(point: Point) -> list[tuple[float | None, int]]:
    names = (("prefill_tokens_per_s", 0), ("decode_tokens_per_s", 0), ("decode_step_ms", 2))
    found = [(point.extra[name], digits) for name, digits in names]
    return [(value if isinstance(value, float) else None, digits) for value, digits in found]


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds else None

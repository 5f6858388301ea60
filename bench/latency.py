"""`tokenmill bench latency`: one request at a time in this process, and how long its tokens take."""

from __future__ import annotations

import argparse

from tokenmill.bench import report, session, throughput
from tokenmill.bench.offline import PHASES
from tokenmill.bench.options import positive
from tokenmill.bench.report import Point, Report, number, percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument(
        "--requests", type=positive, default=8, metavar="N", help="one after the other (default 8)"
    )
    session.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the requests one by one and publish the result."""
    opened = session.open_session(args, batch=1)
    measured = throughput.measure(opened, batch=1, requests=args.requests, rounds=1, seed=args.seed)
    point = throughput.as_point(opened, measured[0], measured)
    print(report.table(("ms", "mean", "p50", "p90", "p99", "largest"), _rows(point)))
    print(f"\n{number(point.output_per_s, 1)} output tok/s, {percent(point.share)} of the limit's", end=" ")
    print(f"{number(point.limit, 1)}\n\nWhere a step's time went:")
    print(report.table(("batch", *PHASES, "elsewhere"), [throughput.phase_cells(measured[0])]))
    result = Report(
        command="tokenmill bench latency",
        settings=session.settings_row(args, opened, load="requests at once"),
        points=[point],
        limits=opened.limits,
        footprint=opened.footprint,
    )
    report.publish(result, args)
    return 0


def _rows(point: Point) -> list[list[str]]:
    return [
        [name, *(number(value, 2) for value in (d.mean, d.p50, d.p90, d.p99, d.largest))]
        for name, d in point.latencies.items()
    ]

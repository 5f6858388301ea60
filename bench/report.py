"""Results as people and programs read them: a table on the terminal, a line of JSON in a file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenmill.bench.distribution import Distribution
from tokenmill.bench.machine import describe_machine, describe_versions
from tokenmill.bench.roofline import Footprint, Limits

JSON_FILE = "tokenmill-bench.jsonl"


@dataclass(frozen=True, slots=True)
class Point:
    """One setting's result. `load` is what was varied: requests at once, or arrivals a second.

    Latencies are in milliseconds, by name (TTFT, ITL, E2E). `limit` is the output rate that the machine
    allows for the same work, `intensity` the work's FLOPs per byte; both None where the model's size isn't
    known.
    """

    series: str
    load: float
    output_per_s: float
    latencies: Mapping[str, Distribution] = field(default_factory=dict)
    limit: float | None = None
    intensity: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    """More for the JSON row."""

    @property
    def share(self) -> float | None:
        """The part of the limit that was reached."""
        return None if self.limit is None else self.output_per_s / self.limit


@dataclass(frozen=True, slots=True)
class Report:
    """All that one command measured."""

    command: str
    settings: Mapping[str, object]
    points: Sequence[Point]
    limits: Limits | None = None
    footprint: Footprint | None = None

    def rows(self) -> list[dict[str, object]]:
        """One JSON object a point, each complete in itself."""
        common = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": self.command,
            "machine": describe_machine(),
            "versions": describe_versions(),
            "settings": dict(self.settings),
            "limits": None if self.limits is None else self.limits.row(),
            "footprint": None if self.footprint is None else self.footprint.row(),
        }
        return [{**common, "result": _point_row(point)} for point in self.points]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `publish` reads."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "--json", default=JSON_FILE, metavar="FILE", help=f"append the results here (default {JSON_FILE})"
    )
    group.add_argument("--plot", metavar="FILE.png", help="draw them, too (needs matplotlib)")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what `publish` couldn't write, before minutes of measuring. Raises OSError or ValueError."""
    for name in filter(None, (args.json, args.plot)):
        if not Path(name).absolute().parent.is_dir():
            raise OSError(f"there is no folder for {name}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'tokenmill[bench]'")


def publish(report: Report, args: argparse.Namespace) -> None:
    """Append the report's rows to `--json`, and draw `--plot`. Raises OSError."""
    with Path(args.json).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in report.rows())
    print(f"\nRows appended to {args.json}")
    if args.plot:
        from tokenmill.bench.plot import draw

        draw(report, Path(args.plot))
        print(f"Plot written to {args.plot}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their heads: the first flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 0) -> str:
    """`1,234`, or with digits `1,234.5`; a dash for what isn't known."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """`87%`, or a dash."""
    return "-" if share is None else f"{100 * share:.0f}%"


def milliseconds(distribution: Distribution) -> str:
    """`p50 / p90 / p99` of milliseconds."""
    return " / ".join(
        f"{value:.0f}" if value >= 100 else f"{value:.1f}"
        for value in (distribution.p50, distribution.p90, distribution.p99)
    )


def limits_line(limits: Limits) -> str:
    """The machine's limits, for people."""
    threads = f", {limits.threads} threads" if limits.threads else ""
    return (
        f"Limits of {limits.device}{threads}: memory {limits.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"{limits.dtype} matmul {limits.matmul_flops_per_s / 1e12:,.2f} TFLOP/s"
    )


def footprint_line(footprint: Footprint) -> str:
    """What each step reads, for people."""
    experts = f", experts {footprint.expert_bytes / 1e6:,.0f} MB" if footprint.expert_bytes else ""
    return (
        f"A step reads {footprint.weight_bytes / 1e6:,.0f} MB of weights{experts} "
        f"and {footprint.kv_bytes_per_token / 1e3:,.1f} KB of cache a token"
    )


def _point_row(point: Point) -> dict[str, object]:
    row: dict[str, object] = {
        "series": point.series,
        "load": point.load,
        "output_tokens_per_s": point.output_per_s,
        "limit_tokens_per_s": point.limit,
        "share_of_limit": point.share,
        "flops_per_byte": point.intensity,
        "latencies_ms": {name: asdict(value) for name, value in point.latencies.items()},
    }
    return row | dict(point.extra)

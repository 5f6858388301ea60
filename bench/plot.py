"""A report as one picture: throughput against load, latency percentiles, and the roofline if it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmill.bench.report import Point, Report
from tokenmill.bench.roofline import Footprint, Limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (5.2, 4.2)
MARKERS = ("o", "|", ">")


def draw(report: Report, file: Path) -> None:
    """Write the picture of `report` to `file`; its suffix names the format. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = [
        lambda axes: _throughput(axes, report),
        lambda axes: _latencies(axes, report),
    ]
    if report.limits is not None and report.footprint is not None:
        limits, footprint = report.limits, report.footprint
        panels.append(lambda axes: _roofline(axes, report, limits, footprint))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), index + 1))
    figure.suptitle(report.command)
    figure.savefig(file, dpi=140)


def _series(report: Report) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in sorted(report.points, key=lambda point: point.load):
        found.setdefault(point.series, []).append(point)
    return found


def _throughput(axes: Axes, report: Report) -> None:
    for index, (name, points) in enumerate(_series(report).items()):
        color = f"C{index}"
        loads = [point.load for point in points]
        axes.plot(loads, [point.output_per_s for point in points], "o-", color=color, label=name)
        known = [(point.load, point.limit) for point in points if point.limit is not None]
        if known:
            axes.plot(*zip(*known, strict=True), ":", color=color, label=f"{name}: the machine's limit")
    axes.set_xlabel(str(report.settings.get("load", "load")))
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.set_title("Throughput")


def _latencies(axes: Axes, report: Report) -> None:
    """A line for each latency at each load, from its median to its 99th percentile."""
    labels: list[str] = []
    colors = {name: f"C{index}" for index, name in enumerate(_series(report))}
    for point in sorted(report.points, key=lambda point: (point.load, point.series)):
        for name, distribution in point.latencies.items():
            row, color = len(labels), colors[point.series]
            values = (distribution.p50, distribution.p90, distribution.p99)
            axes.plot(values, [row] * len(values), "-", color=color, linewidth=1)
            for value, marker in zip(values, MARKERS, strict=True):
                axes.plot([value], [row], marker, color=color)
            labels.append(f"{name} at {point.load:g}")
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("ms: p50 (dot), p90 (stroke), p99 (tip)")
    axes.set_title("Latency")


def _roofline(axes: Axes, report: Report, limits: Limits, footprint: Footprint) -> None:
    """Decode's arithmetic against what memory and matrix units allow."""
    ridge = limits.matmul_flops_per_s / limits.read_bytes_per_s
    known = [(point.intensity, point) for point in report.points if point.intensity is not None]
    left = min([0.5, *(intensity / 2 for intensity, _ in known)])
    roof = [(left, left * limits.read_bytes_per_s), (ridge, limits.matmul_flops_per_s)]
    axes.loglog(*zip(*roof, (4 * ridge, limits.matmul_flops_per_s), strict=True), "k-", label="limit")
    colors = {name: f"C{index}" for index, name in enumerate(_series(report))}
    for intensity, point in known:
        reached = point.output_per_s * footprint.flops_per_token
        axes.plot([intensity], [reached], "o", color=colors[point.series])
        axes.annotate(f"{point.load:g}", (intensity, reached), textcoords="offset points", xytext=(6, -4))
    axes.set_xlabel("FLOPs per byte read in decode")
    axes.set_ylabel("FLOP/s of generated tokens")
    axes.set_title("Roofline")

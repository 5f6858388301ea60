"""What a GPU check found: kept while it runs, told at its end, as a table, one JSON file and a picture."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.bench import report
from tokenmill.bench.gpu_models import Sizes
from tokenmill.bench.gpu_speed import Figure
from tokenmill.bench.machine import describe_machine, describe_versions

if TYPE_CHECKING:
    import torch

    from tokenmill.bench.roofline import Limits

HEAD = ("what", "model", "value", "unit", "limit", "share", "target", "met")
RESERVE_S = 20.0
"""Seconds kept back for writing the results down."""


class Check:
    """One run: what was found so far, and the time left."""

    def __init__(self, device: torch.device, sizes: Sizes, budget: float, seed: int) -> None:
        self.device, self.sizes, self.seed = device, sizes, seed
        self.began, self.budget = time.monotonic(), budget
        self.figures: list[tuple[str, Figure]] = []
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self.rows: dict[str, Any] = {}
        self.limits: Limits | None = None

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - RESERVE_S - (time.monotonic() - self.began)

    def attempt(self, name: str, work: Callable[[], object], *, needs: float = 5.0) -> None:
        """Run one part if at least `needs` seconds are left; what it raises is a failure of this part alone."""
        if self.left < needs:
            self.skipped.append(name)
            print(f"{name}: left out, {max(0.0, self.left):.0f} s are left", flush=True)
            return
        began = time.monotonic()
        try:
            work()
        except Exception as error:  # a part of a check that breaks is a finding, not the end of the check
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(f"FAILED {what}", flush=True)

    def add(self, model: str, figure: Figure) -> None:
        self.figures.append((model, figure))
        print("  " + "  ".join(cells(model, figure)), figure.note, flush=True)


def cells(model: str, figure: Figure) -> list[str]:
    digits = 0 if figure.unit == "tok/s" else 4
    lower_is_better = figure.limit is None
    met = ""
    if figure.target is not None:
        reached = figure.value <= figure.target if lower_is_better else figure.value >= figure.target
        met = "yes" if reached else "no"
    return [
        figure.name, model, report.number(figure.value, digits), figure.unit, report.number(figure.limit),
        report.percent(figure.share), report.number(figure.target, digits), met,
    ]  # fmt: skip


def write_results(check: Check, folder: Path, sections: set[str]) -> None:
    """One JSON file, and a picture where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "tokenmill.bench.gpu_check",
        "device": check.limits.device if check.limits is not None else str(check.device),
        "sections": sorted(sections),
        "seconds": time.monotonic() - check.began,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "limits": None if check.limits is None else check.limits.row(),
        "figures": [{"model": model, **figure.row()} for model, figure in check.figures],
        "failures": check.failures,
        "skipped": check.skipped,
        **check.rows,
    }
    file = folder / "gpu-check.json"
    file.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"\nResults in {file}")
    if check.figures:
        try:
            draw(check, folder / "gpu-check.png")
        except ImportError:
            print("No picture: matplotlib isn't installed")


def draw(check: Check, file: Path) -> None:
    """Bars of the shares that were reached, with a stroke at each target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    shown = [
        (f"{figure.name}\n{model}", figure) for model, figure in check.figures if figure.share is not None
    ]
    picture = Picture(figsize=(9, 1.2 + 0.55 * len(shown)), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    for row, (_, figure) in enumerate(shown):
        share = figure.share or 0.0
        axes.barh(row, 100 * share, color="C0")
        axes.annotate(
            f" {figure.value:,.0f} {figure.unit}", (100 * share, row), va="center", fontsize="small"
        )
        if figure.target is not None and figure.limit:
            axes.plot([100 * figure.target / figure.limit] * 2, [row - 0.4, row + 0.4], "k-", linewidth=2)
    axes.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("% of the limit measured in the same run (stroke: target)")
    axes.set_title("GPU check" if check.limits is None else check.limits.device)
    picture.savefig(file, dpi=140)
    print(f"Picture in {file}")


def print_table(check: Check) -> None:
    """The end of the output: what failed, what was left out, the table."""
    print()
    for failure in check.failures:
        print(f"FAILED {failure}")
    if check.skipped:
        print("Left out for lack of time: " + "; ".join(check.skipped))
    print(report.table(HEAD, [cells(model, figure) for model, figure in check.figures]))
    print(f"\n{'FAILED' if check.failures else 'passed'} in {time.monotonic() - check.began:.0f} s")

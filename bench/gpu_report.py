"""What a GPU check found, told at its end: a table, one JSON file and a picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tokenmill.bench import report
from tokenmill.bench.gpu_journal import Findings
from tokenmill.bench.gpu_runner import cells
from tokenmill.bench.machine import describe_machine, describe_versions

HEAD = ("what", "model", "value", "unit", "limit", "share", "target", "met")
MOST_FAILURES = 40
"""Lines of failures that the summary shows: the end of an output is what a remote machine hands back."""


def write_results(found: Findings, folder: Path, about: dict[str, Any]) -> Path:
    """One JSON file, written anew; returns it. `about`: the run's own fields."""
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "tokenmill.bench.gpu_check",
        **about,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "limits": [limits.row() for limits in found.limits],
        "figures": [{"model": model, **figure.row()} for model, figure in found.figures],
        "failures": found.failures,
        "skipped": found.skipped,
        "part_seconds": found.seconds,
        **found.rows,
    }
    file, new = folder / "gpu-check.json", folder / "gpu-check.json.new"
    new.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    new.replace(file)
    return file


def draw_results(found: Findings, folder: Path) -> None:
    """A picture, where there are figures and matplotlib is installed."""
    if found.figures:
        try:
            draw(found, folder / "gpu-check.png")
        except ImportError:
            print("No picture: matplotlib isn't installed")


def draw(found: Findings, file: Path) -> None:
    """Bars of the shares that were reached, with a stroke at each target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    shown = [
        (f"{figure.name}\n{model}", figure) for model, figure in found.figures if figure.share is not None
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
    axes.set_title(found.limits[0].device if found.limits else "GPU check")
    picture.savefig(file, dpi=140)
    print(f"Picture in {file}")


def print_table(found: Findings, seconds: float) -> None:
    """The end of the output: the table, what was left out, what failed."""
    print()
    print(report.table(HEAD, [cells(model, figure) for model, figure in found.figures]))
    if found.skipped:
        print("Left out: " + "; ".join(found.skipped))
    for failure in found.failures[:MOST_FAILURES]:
        print(f"FAILED {failure}")
    if len(found.failures) > MOST_FAILURES:
        print(f"… and {len(found.failures) - MOST_FAILURES} failures more, in the JSON file")
    print(f"\n{'FAILED' if found.failures else 'passed'} in {seconds:.0f} s")

"""Tables, JSON rows, pictures, and what is said of the machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tokenmill.bench import report
from tokenmill.bench.distribution import describe
from tokenmill.bench.machine import describe_machine, describe_versions, usable_cores
from tokenmill.bench.report import Point, Report
from tokenmill.bench.roofline import Footprint, Limits

LIMITS = Limits("cpu", "bfloat16", 24e9, 2.2e12, threads=2)
FOOTPRINT = Footprint(269e6, 134.5e6, 23_040.0)


def points() -> list[Point]:
    taken = {"TTFT": describe([20.0, 30.0]), "ITL": describe([11.0, 12.0, 500.0]), "E2E": describe([])}
    return [
        Point("ours", 1, 75.0, taken, limit=88.0, intensity=1.0, extra={"requests": 4}),
        Point("ours", 8, 500.0, taken, limit=590.0, intensity=7.0),
        Point("theirs", 8, 250.0, taken),
    ]


def published(folder: Path, command: Report, plot: str | None = None) -> list[dict[str, object]]:
    args = argparse.Namespace(json=str(folder / "rows.jsonl"), plot=plot and str(folder / plot))
    report.publish(command, args)
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_row_a_point_appended(tmp_path: Path) -> None:
    command = Report("tokenmill bench x", {"load": "batch"}, points(), LIMITS, FOOTPRINT)
    rows = published(tmp_path, command)
    assert len(rows) == 3
    assert len(published(tmp_path, command)) == 6
    for row in rows:
        assert set(row) == {
            "time",
            "command",
            "machine",
            "versions",
            "settings",
            "limits",
            "footprint",
            "result",
        }
        assert row["limits"] == LIMITS.row()
    result = rows[0]["result"]
    assert isinstance(result, dict)
    assert result["share_of_limit"] == pytest.approx(75 / 88)
    assert result["latencies_ms"]["ITL"]["p50"] == 12.0
    assert result["requests"] == 4


def test_an_unknown_limit_stays_unknown(tmp_path: Path) -> None:
    rows = published(tmp_path, Report("x", {}, points()))
    results = [row["result"] for row in rows]
    assert rows[0]["limits"] is rows[0]["footprint"] is None
    assert isinstance(results[2], dict)
    assert results[2]["share_of_limit"] is None


@pytest.mark.parametrize("footprint", [FOOTPRINT, None])
def test_plot(tmp_path: Path, footprint: Footprint | None) -> None:
    """A wide picture with the roofline, a narrower one where the model's size isn't known."""
    limits = LIMITS if footprint else None
    published(tmp_path, Report("bench", {"load": "batch"}, points(), limits, footprint), plot="plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width / height == pytest.approx((3 if footprint else 2) * 5.2 / 4.2, rel=0.01)


def test_table_lines_up() -> None:
    text = report.table(("server", "n"), [["a", "1"], ["longer name", "1,000"]])
    assert text.splitlines() == [
        "server           n",
        "-----------  -----",
        "a                1",
        "longer name  1,000",
    ]


def test_numbers_for_people() -> None:
    assert report.number(1234.56) == "1,235"
    assert report.number(1234.56, 1) == "1,234.6"
    assert report.number(None) == report.percent(None) == "-"
    assert report.percent(0.874) == "87%"
    assert report.milliseconds(describe([5.0, 5.0, 250.0])) == "5.0 / 201 / 245"
    assert report.limits_line(LIMITS) == (
        "Limits of cpu, 2 threads: memory 24.0 GB/s, bfloat16 matmul 2.20 TFLOP/s"
    )
    assert report.footprint_line(FOOTPRINT) == "A step reads 269 MB of weights and 23.0 KB of cache a token"


def test_the_machine_is_described_without_its_name() -> None:
    import socket

    machine, versions = describe_machine(), describe_versions()
    assert machine["cpu"]
    assert machine["cores"] == usable_cores() >= 1
    assert {"python", "torch", "transformers"} <= set(versions)
    assert socket.gethostname() not in json.dumps([machine, versions])
    assert describe_versions(["surely-not-installed"]).keys() <= {"python", "commit"}

"""The GPU check, rehearsed small on the CPU: every section runs, and what is wrong or left out is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tokenmill.bench import gpu_check, gpu_report
from tokenmill.bench.gpu_models import SHAPES, build_module, rehearsal, shrunk
from tokenmill.bench.gpu_speed import Figure, covered

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal sets is undone."""
    monkeypatch.setattr(os, "environ", os.environ)
    monkeypatch.setenv("TOKENMILL_KERNELS", "triton")


def test_a_rehearsal_runs_and_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(
        ["--rehearse", "--sections", "texts,logits,speed", "--out", str(tmp_path), "--seed", "3"]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["failures"] == []
    assert result["skipped"] == []
    assert result["logits"]["Qwen3-0.6B"]["error"] < 1e-5
    names = [figure["name"] for figure in result["figures"]]
    assert names[:3] == ["decode, batch 1", "nano-vllm's workload", "sampler with every feature on"]
    assert (tmp_path / "gpu-check.png").stat().st_size > 1000
    assert out.rstrip().splitlines()[-1].startswith("passed in ")


def test_wrong_logits_and_texts_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a model of other weights everything is wrong."""

    def other(fields: dict[str, object], *args: object, seed: int = 0) -> object:
        return build_module(fields, *args, seed=seed + 1)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_check, "build_module", other)
    status = gpu_check.main(["--rehearse", "--sections", "texts,logits", "--out", str(tmp_path)])
    failures = json.loads((tmp_path / "gpu-check.json").read_text())["failures"]
    assert status == 1
    assert [failure.partition(":")[0] for failure in failures] == ["Qwen3-0.6B, tiny", "Qwen3-0.6B"]


def test_what_the_budget_does_not_hold_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--rehearse", "--budget", "1", "--out", str(tmp_path)]) == 0
    assert "kernels" in json.loads((tmp_path / "gpu-check.json").read_text())["skipped"]
    assert "Left out for lack of time: kernels; texts; " in capsys.readouterr().out


def test_a_part_that_raises_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    check = gpu_report.Check(torch.device("cpu"), rehearsal(), 100, 0)
    check.attempt("first", lambda: 1 / 0)
    check.attempt("second", lambda: None)
    assert check.failures == ["first: ZeroDivisionError: division by zero"]
    assert "second: 0.0 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_shapes_are_those_of_the_checkpoints() -> None:
    """Parameters as the models' cards give them, counted without storage."""
    counts = {
        name: sum(
            x.numel()
            for x in build_module(fields, torch.device("meta"), torch.bfloat16, "eager").parameters()
        )
        for name, fields in SHAPES.items()
    }
    assert {name: round(count / 1e9, 2) for name, count in counts.items()} == {
        "Qwen3-0.6B": 0.60, "Llama-3.2-1B": 1.24, "Llama-3.1-8B": 8.03,
    }  # fmt: skip


def test_random_weights_are_a_function_of_the_seed() -> None:
    fields = shrunk(SHAPES["Qwen3-0.6B"])
    one, same, other = (
        build_module(fields, torch.device("cpu"), torch.float32, "eager", seed=seed).lm_head.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_covered_counts_overlaps_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == (4, 6)


def test_figures_know_whether_they_met_their_target() -> None:
    fast = Figure("decode", 90, "tok/s", limit=100, target=80)
    idle = Figure("idle", 0.01, "of the time", target=0.005)
    assert fast.share == 0.9
    assert [gpu_report.cells("m", figure)[-1] for figure in (fast, idle)] == ["yes", "no"]

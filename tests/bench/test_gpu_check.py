"""The GPU check, rehearsed small on the CPU: every section runs, and what is wrong or left out is said."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenmill.bench import gpu_check, gpu_correct, gpu_runner
from tokenmill.bench.gpu_journal import Findings, Journal
from tokenmill.bench.gpu_models import SHAPES, build_module, make_engine, rehearsal, shrunk
from tokenmill.bench.gpu_speed import Figure, covered, idle_share

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal sets is undone."""
    monkeypatch.setattr(os, "environ", os.environ)
    monkeypatch.setenv("TOKENMILL_KERNELS", "triton")


def test_a_rehearsal_runs_and_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(
        [
            "--rehearse",
            "--one-process",
            "--sections",
            "logits,speed",
            "--out",
            str(tmp_path),
            "--seed",
            "3",
        ]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert result["failures"] == []
    assert result["skipped"] == []
    assert [row["model"] for row in result["logits"]] == ["Qwen3-0.6B"]
    assert result["logits"][0]["error"] < 1e-5
    names = [figure["name"] for figure in result["figures"]]
    assert names[:2] == ["decode, batch 1", "nano-vllm's workload"]
    assert {"sampler with every feature on", "the peer's jobs"} <= set(names)
    assert (tmp_path / "gpu-check.png").stat().st_size > 1000
    assert out.rstrip().splitlines()[-1].startswith("passed in ")


def test_wrong_logits_and_texts_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a model of other weights everything is wrong."""

    def other(fields: dict[str, object], *args: object, seed: int = 0) -> object:
        return build_module(fields, *args, seed=seed + 1)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_correct, "build_module", other)
    status = gpu_check.main(
        ["--rehearse", "--one-process", "--sections", "texts,logits", "--out", str(tmp_path)]
    )
    failures = json.loads((tmp_path / "gpu-check.json").read_text())["failures"]
    assert status == 1
    assert [failure.partition(":")[0] for failure in failures] == ["Qwen3-0.6B, tiny", "Qwen3-0.6B"]


def test_what_the_budget_does_not_hold_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--rehearse", "--budget", "1", "--out", str(tmp_path)]) == 0
    skipped = json.loads((tmp_path / "gpu-check.json").read_text())["skipped"]
    assert skipped == ["kernels", "texts", "Qwen3-0.6B", "peers", "fp8", "micro"]
    assert "Left out: kernels; texts; " in capsys.readouterr().out


def test_a_run_that_is_ended_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_unit(check: gpu_runner.Check, unit: str, sections: set[str]) -> None:
        if unit == "micro":
            raise KeyboardInterrupt
        check.add("m", Figure("decode", 90, "tok/s"))

    monkeypatch.setattr(gpu_check, "run_unit", run_unit)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--rehearse", "--one-process", "--sections", "kernels,micro", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [figure["value"] for figure in result["figures"]] == [90]


def test_sections_and_models_choose_what_runs() -> None:
    models = ["a", "b", "c"]
    assert gpu_check.units({"logits"}, models) == models
    assert gpu_check.units({"micro", "kernels", "peers", "speed"}, models) == [
        "kernels", "a", "peers", "b", "c", "micro",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        gpu_check.main(["--models", "gpt-5"])


def test_without_the_engines_packages_the_kernels_run_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine with torch and Triton alone: said once, at the start, and what can run does."""
    ran: list[str] = []
    monkeypatch.setattr(gpu_check, "ENGINE_NEEDS", ("msgspec", "no_such_package"))
    monkeypatch.setattr(gpu_check, "run_unit", lambda check, unit, sections: ran.append(unit))
    status = gpu_check.main(["--rehearse", "--one-process", "--out", str(tmp_path)])
    assert (status, ran) == (1, ["kernels", "micro"])
    what = "texts, logits, speed, peers, fp8: not run, no_such_package not installed (pip install no_such_package)"
    assert json.loads((tmp_path / "gpu-check.json").read_text())["failures"] == [what]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"FAILED {what}"


def make_check(folder: Path) -> gpu_runner.Check:
    return gpu_runner.Check(torch.device("cpu"), rehearsal(), 1000, 0, Journal(folder / "found.jsonl"))


def test_a_part_that_raises_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = make_check(tmp_path)
    check.attempt("first", lambda: 1 / 0)
    check.attempt("second", lambda: check.add("m", Figure("decode", 90, "tok/s", limit=100, target=80)))
    found = Findings.read(check.journal)
    assert found.failures == ["first: ZeroDivisionError: division by zero"]
    assert [(model, figure.share) for model, figure in found.figures] == [("m", 0.9)]
    assert set(found.seconds) == {"first", "second"}
    out = capsys.readouterr().out
    assert "test_gpu_check.py" in out, "the place is shown"
    assert "second: 0.0 s" in out


def test_a_profiler_that_can_not_be_used_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it doesn't start, and where it sees no kernel."""

    class Refusing:
        def __init__(self, activities: object) -> None:
            raise AssertionError("No activities specified for the profiler")

    class Blind:
        def __init__(self, activities: object) -> None:
            self.start = self.stop = self.events = list

    sizes = rehearsal()
    fields = sizes.shapes["Qwen3-0.6B"]
    engine = make_engine(fields, torch.device("cpu"), torch.float32, max_context=512, max_batch=1)
    monkeypatch.setattr(engine, "step", list)
    journal = Journal(tmp_path / "journal")
    check = gpu_runner.Check(torch.device("cpu"), sizes, 100, 0, journal)
    for name, profiler in (("refused", Refusing), ("blind", Blind)):
        monkeypatch.setattr(torch.profiler, "profile", profiler)
        check.attempt(name, lambda: idle_share(engine, 1, 2, 0.005))
    found = Findings.read(journal)
    assert not found.failures
    assert found.skipped == [
        "refused (torch's profiler doesn't start: No activities specified for the profiler)",
        "blind (torch's profiler sees no kernel here)",
    ]


def test_what_others_need_is_made_by_each_process(tmp_path: Path) -> None:
    made = [make_check(tmp_path).value("limits", lambda: 7) for _ in range(2)]
    assert made == [7, 7]
    assert make_check(tmp_path).value("nothing", lambda: 1 / 0) is None


def test_what_a_process_had_begun_is_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        check = make_check(tmp_path)
        check.attempt("once", lambda: calls.append("once"))
        check.attempt("always", lambda: calls.append("always"), again=True)
    assert calls == ["once", "always", "always"]


PARTS = """
import sys
from pathlib import Path
import torch
from tokenmill.bench.gpu_journal import Journal
from tokenmill.bench.gpu_models import rehearsal
from tokenmill.bench.gpu_runner import Check
import os, time

def die(): os.kill(os.getpid(), 11)
def hang(): time.sleep(600)
def lose(): raise torch.AcceleratorError("an illegal memory access was encountered")
def work(): pass
check = Check(torch.device("cpu"), rehearsal(), 1000, 0, Journal(Path(sys.argv[1])), own_process=True)
check.attempt("setting up", work, again=True)
for name in sys.argv[2:]:
    part = dict(die=die, hang=hang, lose=lose, work=work)[name.split()[0]]
    check.attempt(name, part, limit=1 if part is hang else 100)
"""


def run_parts(folder: Path, *parts: str) -> Findings:
    journal = Journal(folder / "found.jsonl")
    command: Callable[[float], list[str]] = lambda seconds: [  # noqa: E731
        sys.executable, "-c", PARTS, str(journal.file), *parts,
    ]  # fmt: skip
    gpu_runner.supervise("section", command, journal, 1000)
    return Findings.read(journal)


def test_a_crash_a_hang_and_a_lost_gpu_cost_one_part_each(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run_parts(tmp_path, "die", "hang", "lose", "work")
    assert [failure.partition(" (")[0] for failure in found.failures] == [
        "die: its process was ended by SIGSEGV",
        "hang: its process ended with 1",
        "lose: AcceleratorError: an illegal memory access was encountered",
    ]
    assert set(found.seconds) == {"setting up", "die", "hang", "lose", "work"}
    assert "in hang" in capfd.readouterr().err, "where it hung is shown"


def test_a_section_that_is_given_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "PROCESSES", 2)
    failures = run_parts(tmp_path, "lose", "lose too", "work").failures
    assert failures[2:] == ["section: given up after 2 processes, parts of it never ran"]


WRAPPED = """
import sys
from pathlib import Path
import torch
from tokenmill.bench import gpu_correct
from tokenmill.bench.gpu_journal import Journal
from tokenmill.bench.gpu_models import rehearsal
from tokenmill.bench.gpu_runner import Check

lost = []

def synchronize(device):
    if lost:
        raise torch.AcceleratorError("an illegal memory access was encountered")

def group(name):
    if name == "wild":
        lost.append(name)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    if lost:
        raise torch.AcceleratorError("an illegal memory access was encountered")
    yield from ()

torch.cuda.synchronize = synchronize
gpu = torch.device("cuda", 0)
check = Check(gpu, rehearsal(), 1000, 0, Journal(Path(sys.argv[1])), own_process=True)
for name in ("wild", "next", "last"):
    check.attempt(name, lambda: gpu_correct._check_group(check, group(name)))
"""


def test_a_wild_kernel_takes_no_other_group_along(tmp_path: Path) -> None:
    """Its error comes wrapped and without a type of its own; the GPU is gone for this process all the same."""
    journal = Journal(tmp_path / "found.jsonl")
    command = [sys.executable, "-c", WRAPPED, str(journal.file)]
    gpu_runner.supervise("kernels", lambda _: command, journal, 1000)
    found = Findings.read(journal)
    assert [failure.partition(":")[0] for failure in found.failures] == ["wild"]
    assert set(found.seconds) == {"wild", "next", "last"}


def test_a_section_past_its_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "RESERVE_S", 0.0)
    journal = Journal(tmp_path / "found.jsonl")
    gpu_runner.supervise(
        "slow", lambda _: [sys.executable, "-c", "import time; time.sleep(600)"], journal, 0.5
    )
    assert Findings.read(journal).failures == [
        "slow: its process took too long and was killed (the output says where it stood)"
    ]


def test_a_rehearsal_in_processes_of_their_own(tmp_path: Path) -> None:
    status = gpu_check.main(["--rehearse", "--sections", "texts", "--out", str(tmp_path), "--seed", "5"])
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert status == 0, result["failures"]
    assert list(result["part_seconds"]) == ["Qwen3-0.6B, tiny: texts"]


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
    assert [gpu_runner.cells("m", figure)[-1] for figure in (fast, idle)] == ["yes", "no"]

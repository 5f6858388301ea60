"""The offline measurements, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tokenmill.bench import cli, limits
from tokenmill.bench.footprint import footprint_of
from tokenmill.bench.limits import measure_limits
from tokenmill.bench.offline import PHASES, Driver
from tokenmill.bench.options import BenchError
from tokenmill.bench.throughput import middle_run
from tokenmill.bench.workload import Job, Workload
from tokenmill.engine.llm import LLM
from tokenmill.engine.tiny import make_tiny

IDS = range(64, 256)
WORK = Workload(prompt_tokens=24, output_tokens=6, token_ids=IDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def driver(checkpoint: Path) -> Driver:
    return Driver(LLM(str(checkpoint), device="cpu", dtype="float32", num_blocks=64, max_batch=4))


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_READ_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "CPU_MATMUL", 64)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_accounts_for_every_token_and_second(driver: Driver, batch: int) -> None:
    seen: list[int] = []
    run = driver.run(WORK.jobs(5, seed=batch), batch, seen.append)
    assert run.lengths == [(24, 6)] * 5
    assert sum(seen) == run.output_tokens == 30
    assert run.prompt_tokens == 5 * 24
    assert 0 < run.decode_tokens <= 5 * 5
    assert len(run.decode_steps) >= 5 * 5 // batch
    assert run.prefill_seconds + run.decode_seconds <= run.seconds
    assert sum(run.decode_steps) == pytest.approx(run.decode_seconds)
    assert set(run.phases) == set(PHASES)
    assert 0 < sum(run.phases.values()) <= run.seconds
    assert run.phases["forward"] > 0
    for timeline in run.timelines:
        assert timeline.began < timeline.arrivals[0] < timeline.arrivals[-1]
        assert timeline.first + sum(timeline.gaps) == pytest.approx(timeline.whole)


def test_one_at_a_time_is_all_decode_but_the_first_step(driver: Driver) -> None:
    run = driver.run(WORK.jobs(4, seed=9), batch=1)
    assert run.decode_tokens == 4 * 5
    assert len(run.decode_steps) == 4 * 5


def test_text_prompts_are_encoded(driver: Driver) -> None:
    text = "time year people way"
    run = driver.run([Job(text, 4, 2)], batch=1)
    assert run.lengths == [(len(driver.tokenizer.encode(text)), 2)]


def test_a_refused_request_ends_the_measurement(driver: Driver) -> None:
    with pytest.raises(BenchError, match="maximum context length"):
        driver.run([Job([70] * 4, 4, 10**6)], batch=1)


def test_middle_run(driver: Driver) -> None:
    runs = [driver.run(WORK.jobs(1, seed), batch=1) for seed in range(3)]
    for run, seconds in zip(runs, (3.0, 1.0, 2.0), strict=True):
        run.seconds = seconds
    assert middle_run(runs) is runs[2]
    assert middle_run(runs[:2]) is runs[0]


def test_footprint_counts_what_a_step_reads(driver: Driver, checkpoint: Path) -> None:
    config, found = AutoConfig.from_pretrained(checkpoint), footprint_of(driver.engine)
    shapes = [tensor.shape for tensor in load_file(checkpoint / "model.safetensors").values()]
    matrices = sum(shape.numel() for shape in shapes if len(shape) == 2)
    tied = config.tie_word_embeddings
    assert found.weights == matrices - (0 if tied else config.vocab_size * config.hidden_size)
    assert found.weight_bytes == 4 * found.weights
    assert found.kv_bytes_per_token == (
        config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    )
    assert found.expert_bytes == 0


def test_footprint_of_a_mixture(tmp_path: Path) -> None:
    make_tiny("qwen3_moe", tmp_path)
    settings = {"device": "cpu", "dtype": "float32", "num_blocks": 16, "max_batch": 1, "fused_decoder": False}
    engine = LLM(str(tmp_path), **settings).engine
    config, found = AutoConfig.from_pretrained(tmp_path), footprint_of(engine)
    assert found.expert_share == config.num_experts_per_tok / config.num_experts < 1
    assert found.expert_weights == sum(
        p.numel() for name, p in engine.model.module.named_parameters() if "experts" in name
    )
    assert found.read_bytes(1) < found.weight_bytes + found.expert_bytes


@pytest.mark.usefixtures("_small_limits")
def test_without_bfloat16_in_the_cpu_its_limit_is_that_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.bfloat16: 6e10, torch.float32: 3e11}
    monkeypatch.setattr(limits, "_matmul_rate", lambda device, dtype, size: rates[dtype])
    monkeypatch.setattr(limits, "_read_rate", lambda: 1.0)
    assert measure_limits(dtype="bfloat16").matmul_flops_per_s == 3e11
    rates[torch.bfloat16] = 2e12
    assert measure_limits(dtype="bfloat16").matmul_flops_per_s == 2e12
    assert measure_limits(dtype="float32").matmul_flops_per_s == 3e11


def test_limits_leave_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    found = measure_limits("cpu", "float32", threads=1)
    assert found.threads == 1
    assert found.read_bytes_per_s > 0
    assert found.matmul_flops_per_s > 0
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_the_command(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.jsonl"
    common = ["--model", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--json", str(rows_file)]
    lengths = ["--requests", "2", "--prompt-tokens", "20", "--output-tokens", "5"]
    extra = ["--batch", "1,2", "--rounds", "2"] if command == "throughput" else []
    engine = ["--engine", '{"num_blocks": 32}', "--plot", str(tmp_path / "plot.png")]
    assert cli.main([command, *common, *lengths, *extra, *engine]) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [row["result"]["load"] for row in rows] == ([1, 2] if command == "throughput" else [1])
    for row in rows:
        assert row["command"] == f"tokenmill bench {command}"
        assert row["limits"]["read_bytes_per_s"] > 0
        assert row["result"]["share_of_limit"] > 0
        assert row["result"]["latencies_ms"]["ITL"]["count"] > 0
        assert set(row["result"]["phase_seconds"]) == set(PHASES)
    assert "Where a step's time went" in shown
    assert "of the limit's" in shown or "share" in shown
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "./no/such.gguf"], "no such file or folder"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--json", "no/such/folder/rows.jsonl"], "there is no folder for no/such/folder/rows.jsonl"),
        (["--temperature", "3"], "temperature must be from 0"),
        (["--engine", "{"], "--engine is no JSON"),
        (["--engine", "[]"], "--engine must be a JSON object"),
        (["--engine", '{"max_bath": 3}'], "no such field 'max_bath'"),
        (["--engine", '{"num_blocks": "3"}'], "Expected `int"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options if "--model" in options else ["--model", str(checkpoint), *options]
    device = [] if "--device" in options else ["--device", "cpu"]
    assert cli.main(["latency", *device, *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tokenmill bench: ")
    assert said in error
    assert error.count("\n") == 1

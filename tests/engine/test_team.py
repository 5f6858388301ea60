"""The processes of a model that ranks share: what each is told, what they refuse, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import tiny
from waiting import alive, eventually

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.config import EngineConfig, KVCacheConfig
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.rank_link import RanksLost
from tokenmill.engine.team import Team, configs_of_ranks


def open_llm(model_type: str, ranks: int, **settings: object) -> LLM:
    defaults = {"max_context": 128, "num_blocks": 20, "dtype": "float32", "device": "cpu"}
    return LLM(str(tiny(model_type)), **{**defaults, "tensor_parallel": ranks, **settings})


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_are_cut_first(quantization: str) -> None:
    """Parts are rounded by scales of their own: log-probabilities are as near the full weights' as one rank's."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    prompt = list(range(10, 60))
    scores = []
    for ranks, how in ((1, None), (1, quantization), (2, quantization)):
        llm = open_llm("llama", ranks, quantization=how)
        found = llm.generate([prompt], params)[0].prompt_logprobs
        llm.close()
        assert found is not None
        scores.append(found.values)
    exact, one, two = scores
    error = [sum(abs(a - b) for a, b in zip(x, exact, strict=True)) for x in (one, two)]
    assert 0 < error[1] < 1.5 * error[0]


def test_a_second_team_is_refused_and_leaves_the_first_alone() -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = open_llm("llama", 2)
    wanted = first.generate([[5, 6]], params)[0].choices[0].token_ids
    with pytest.raises(LoadError, match="has a model with tensor_parallel already"):
        open_llm("llama", 2)
    assert first.generate([[5, 6]], params)[0].choices[0].token_ids == wanted
    first.close()


def test_converted_weights_are_loaded_in_turn() -> None:
    """The files are float32: each rank makes bfloat16 of the whole model before it takes its part."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scores = []
    for ranks in (1, 2):
        llm = open_llm("llama", ranks, dtype="bfloat16")
        assert llm.engine.model.copied
        found = llm.generate([list(range(10, 40))], params)[0].prompt_logprobs
        llm.close()
        assert found is not None
        scores.append(found.values)
    assert scores[1] == pytest.approx(scores[0], abs=0.2)


def test_a_cache_of_so_many_gib_is_that_of_all_ranks_together() -> None:
    sizes = []
    for ranks in (1, 2):
        llm = open_llm("llama", ranks, num_blocks=None, kv_cache=KVCacheConfig(gib=0.002), max_batch=64)
        capacity = llm.engine.runner.forward.capacity
        sizes.append(capacity.num_blocks)
        assert capacity.bytes_per_token * capacity.tokens <= 0.002 * 2**30
        llm.close()
    assert sizes[0] == sizes[1]


def test_no_room_on_any_rank_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late rank 0 says so: the other rank, which finds the same, waits for that."""
    close, waited = Team.close, []

    def late(team: Team) -> None:
        time.sleep(0.5)
        waited.extend(child.poll() is None for child in team._children)
        close(team)

    monkeypatch.setattr(Team, "close", late)
    with pytest.raises(MemoryError, match="no room for a KV cache"):
        open_llm("llama", 2, num_blocks=None, kv_cache=KVCacheConfig(gib=1e-6))
    assert waited == [True]


@pytest.mark.parametrize("within_a_step", [False, True])
def test_a_lost_rank_is_an_error_in_a_process_of_ones_own(
    within_a_step: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The process lives on, and may open a model again."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = open_llm("llama", 2)
    wanted = llm.generate([[5, 6]], params)[0].choices[0].token_ids
    (child,) = llm.engine._team._children  # type: ignore[union-attr]
    if within_a_step:
        child.send_signal(signal.SIGSTOP)  # it takes no part in a sum, and rank 0 waits for it
        threading.Timer(0.3, child.kill).start()
    else:
        child.kill()
        eventually(lambda: "rank 1 has ended: the model is lost" in caplog.text)
    with pytest.raises(RanksLost):
        llm.generate([[5, 6]], params)
    llm.close()
    again = open_llm("llama", 2)
    assert again.generate([[5, 6]], params)[0].choices[0].token_ids == wanted
    again.close()


def test_a_part_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("tokenmill.engine.parallel_forward.shard", full)
    with pytest.raises(LoadError, match="a rank's part of its weights doesn't fit into the memory of cpu"):
        open_llm("llama", 2)


@pytest.mark.parametrize(
    ("model_type", "ranks", "message"),
    [
        ("gpt2", 2, "needs the fused decoder, which doesn't run a gpt2"),
        ("llama", 3, "doesn't divide its 4 query heads"),
    ],
)
def test_what_ranks_can_not_share_is_refused(model_type: str, ranks: int, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        open_llm(model_type, ranks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:1"}, "takes the first 2 GPUs"),
        ({"device": "cuda"}, "needs 2 GPUs; torch sees"),
        ({"quantization": "gguf"}, "cut through the blocks"),
        ({"deterministic": True, "tensor_parallel": 4}, "no fixed order"),
    ],
)
def test_settings_that_do_not_go_together(
    settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = EngineConfig(**{"source": "x", "device": "cpu", "tensor_parallel": 2, **settings})  # type: ignore[arg-type]
    with pytest.raises(LoadError, match=message):
        configs_of_ranks(config)


def test_each_rank_has_a_gpu_or_its_part_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(source="x", device="cpu", tensor_parallel=2, threads=7)
    assert [(one.device, one.threads) for one in configs_of_ranks(config)] == [("cpu", 3), ("cpu", 3)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = EngineConfig(source="x", tensor_parallel=4)
    assert [one.device for one in configs_of_ranks(config)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


FAILS = """
import socket, sys
from tokenmill.engine.rank_link import Failed, Link
link = Link(socket.socket(fileno=int(sys.argv[-1])))
link.receive()
{then}
"""


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("link.send(Failed('x: rank 1 has no luck'))", "^x: rank 1 has no luck$"),
        ("", "rank 1 ended while it loaded"),
    ],
)
def test_a_rank_that_fails_while_loading_says_why(
    then: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.engine.team.COMMAND", (sys.executable, "-c", FAILS.format(then=then)))
    with pytest.raises(LoadError, match=message):
        open_llm("llama", 2)


def test_ranks_end_with_the_engine_however_it_ends() -> None:
    """Rank 0 is killed; nobody tells the other one but the closed socket."""
    script = (
        "import sys; from tokenmill.engine import LLM\n"
        "llm = LLM(sys.argv[1], device='cpu', tensor_parallel=2, max_context=128, num_blocks=20)\n"
        "print(llm.engine._team._children[0].pid, llm.engine._team._folder, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny("llama"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid, folder = process.stdout.readline().split()
    assert alive(int(pid))
    process.kill()
    process.wait()
    eventually(lambda: not alive(int(pid)) and not os.path.exists(folder))


def test_a_closed_team_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    team = Team(EngineConfig(source="x", device="cpu", tensor_parallel=3))
    children = team._children
    assert len(children) == 2
    assert list(tmp_path.iterdir())
    team.close()
    assert [child.poll() is not None for child in children] == [True, True]
    assert not list(tmp_path.iterdir())

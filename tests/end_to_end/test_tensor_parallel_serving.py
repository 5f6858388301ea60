"""A model that two processes share: served, and started again when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from server_process import Server, serving

from tokenmill.engine.tiny import make_tiny

CANARY = {"model": "tiny/llama", "prompt": "The mill", "max_tokens": 24, "temperature": 0, "logprobs": 2}
SHARED = """
version: 1
defaults: {{dtype: float32}}
models:
  tiny/llama: {{source: {tiny}, max_context: 4096, device: cpu, tensor_parallel: 2}}
  tiny/whole: {{source: {tiny}, max_context: 4096}}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    config = folder / "models.yaml"
    config.write_text(SHARED.format(tiny=make_tiny("llama", folder / "tiny", max_position_embeddings=4096)))
    with serving(config) as server:
        yield server


def canary(server: Server, model: str = "tiny/llama") -> dict[str, object]:
    answer = httpx.post(f"{server.url}/v1/completions", json={**CANARY, "model": model}, timeout=60)
    assert answer.status_code == 200, answer.text
    choice: dict[str, object] = answer.json()["choices"][0]
    return choice


def children(parent: int, pattern: str) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(parent), "-f", pattern], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def other_rank(server: Server) -> int:
    """The process of rank 1."""
    engines = children(server.process.pid, "engine.host")
    (found,) = [child for engine in engines for child in children(engine, "rank_host")]
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.02)


def test_it_answers_as_the_whole_model_does(shared: Server) -> None:
    one, two = canary(shared, "tiny/whole"), canary(shared)
    assert two["text"] == one["text"]
    scores = [choice["logprobs"]["token_logprobs"] for choice in (one, two)]  # type: ignore[index]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_a_killed_rank_fails_requests_and_the_model_comes_back(shared: Server) -> None:
    expected, statuses = canary(shared), list[int]()

    def ask() -> None:
        body = {**CANARY, "max_tokens": 4000, "ignore_eos": True}
        statuses.append(httpx.post(f"{shared.url}/v1/completions", json=body, timeout=60).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: shared.metric("tokenmill_running") == 1)
    killed = other_rank(shared)
    os.kill(killed, signal.SIGKILL)
    asking.join(timeout=10)
    assert statuses == [503]
    assert httpx.get(f"{shared.url}/health/tiny/llama").status_code == 503
    assert canary(shared, "tiny/whole")["text"] == expected["text"]
    wait_for(lambda: httpx.get(f"{shared.url}/health/tiny/llama").status_code == 200)
    assert other_rank(shared) != killed
    assert canary(shared) == expected
    assert shared.metric("tokenmill_used_blocks") == 0

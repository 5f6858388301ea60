"""A model that two processes share: served, and started again when one of them dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from server_process import Server, serving
from waiting import PATIENCE_S, eventually

from tokenmill.engine.tiny import make_tiny

CONTEXT = 1 << 17
"""More than is generated while a test may last, whatever stops it for a while."""
CANARY = {"model": "tiny/llama", "prompt": "The mill", "max_tokens": 24, "temperature": 0, "logprobs": 2}
SHARED = """
version: 1
defaults: {{dtype: float32}}
models:
  tiny/llama: {{source: {tiny}, max_context: {context}, device: cpu, tensor_parallel: 2}}
  tiny/whole: {{source: {tiny}, max_context: {context}}}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    config = folder / "models.yaml"
    tiny = make_tiny("llama", folder / "tiny", max_position_embeddings=CONTEXT)
    config.write_text(SHARED.format(tiny=tiny, context=CONTEXT))
    with serving(config) as server:
        yield server


def canary(server: Server, model: str = "tiny/llama") -> dict[str, object]:
    answer = server.post("/v1/completions", {**CANARY, "model": model})
    assert answer.status_code == 200, answer.text
    choice: dict[str, object] = answer.json()["choices"][0]
    return choice


def other_ranks(server: Server) -> list[int]:
    """The process of rank 1, where there is one."""
    engines = server.children("engine.host")
    return [child for engine in engines for child in server.children("rank_host", engine)]


def test_it_answers_as_the_whole_model_does(shared: Server) -> None:
    one, two = canary(shared, "tiny/whole"), canary(shared)
    assert two["text"] == one["text"]
    scores = [choice["logprobs"]["token_logprobs"] for choice in (one, two)]  # type: ignore[index]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_a_killed_rank_fails_requests_and_the_model_comes_back(shared: Server) -> None:
    expected, statuses = canary(shared), list[int]()

    def ask() -> None:
        body = {**CANARY, "max_tokens": CONTEXT // 2, "ignore_eos": True}
        statuses.append(shared.post("/v1/completions", body).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: shared.metric("tokenmill_running") == 1)
    (killed,) = other_ranks(shared)
    os.kill(killed, signal.SIGKILL)
    asking.join(timeout=PATIENCE_S)
    assert statuses == [503]
    assert canary(shared, "tiny/whole")["text"] == expected["text"]
    eventually(lambda: killed not in other_ranks(shared))
    eventually(lambda: shared.get("/health/tiny/llama").status_code == 200)
    assert canary(shared) == expected
    eventually(lambda: shared.metric("tokenmill_used_blocks") == 0)

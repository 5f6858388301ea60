"""The engine process dies, and the server goes on: errors at once, a restart, the same text as before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import Server, serving
from waiting import PATIENCE_S, alive, eventually, paused

from tokenmill.engine.tiny import make_tiny

CONTEXT = 1 << 17
"""More than is generated while a test may last, whatever stops it for a while."""
CANARY = {"model": "tiny/llama", "prompt": "The mill", "max_tokens": 24, "temperature": 0}
ONE_MODEL = """
version: 1
server: {{drain_s: 3600, watchdog_s: 3600, load_silence_s: 5}}
models:
  tiny/llama:
    source: {tiny}
    dtype: float32
    max_context: {context}
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own."""
    config = tmp_path / "models.yaml"
    tiny = make_tiny("llama", tmp_path / "tiny", max_position_embeddings=CONTEXT)
    config.write_text(ONE_MODEL.format(tiny=tiny, context=CONTEXT))
    with serving(config) as server:
        yield server


def canary(server: Server) -> str:
    answer = server.post("/v1/completions", CANARY)
    assert answer.status_code == 200
    text: str = answer.json()["choices"][0]["text"]
    return text


def engine_of(server: Server) -> int:
    """The process id of the one engine."""
    (engine,) = server.children("engine.host")
    return engine


def stream(server: Server, max_tokens: int) -> tuple[threading.Thread, list[str]]:
    """A stream that is read to its end, whatever that is; its lines."""
    lines: list[str] = []

    def read() -> None:
        body = {**CANARY, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    return reader, lines


def test_a_killed_engine_fails_its_requests_and_is_restarted(alone: Server) -> None:
    expected = canary(alone)
    reader, lines = stream(alone, CONTEXT // 2)
    eventually(lambda: lines)
    killed = engine_of(alone)
    os.kill(killed, signal.SIGKILL)
    reader.join(timeout=PATIENCE_S)
    assert not reader.is_alive(), "the stream must end at once"
    assert '"error"' in lines[-1]
    assert not any('"finish_reason":"' in line for line in lines)
    eventually(lambda: killed not in alone.children("engine.host"))
    eventually(lambda: alone.get("/health").status_code == 200)
    assert canary(alone) == expected
    eventually(lambda: alone.metric("tokenmill_used_blocks") == 0)


def test_an_engine_that_is_stopped_while_it_loads_is_replaced(alone: Server) -> None:
    expected, killed = canary(alone), engine_of(alone)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: alone.children("engine.host") not in ([], [killed]))
    stopped = engine_of(alone)
    with paused(stopped):
        assert alone.get("/health").status_code == 503
        eventually(lambda: not alive(stopped))
    eventually(lambda: alone.get("/health").status_code == 200)
    assert canary(alone) == expected


def test_sigterm_lets_a_stream_finish_and_leaves_no_process(alone: Server) -> None:
    engine = engine_of(alone)
    with paused(engine):
        reader, lines = stream(alone, 300)
        eventually(lambda: alone.metric("tokenmill_requests_without_token") == 1)
        os.kill(alone.process.pid, signal.SIGTERM)
        eventually(lambda: alone.get("/health").status_code == 503)
        assert alone.post("/v1/completions", CANARY).status_code == 503
    reader.join(timeout=PATIENCE_S)
    assert lines[-1] == "data: [DONE]"
    assert alone.process.wait(timeout=PATIENCE_S) == 0
    eventually(lambda: not alive(engine))


def test_sigint_ends_everything_at_once(alone: Server) -> None:
    reader, lines = stream(alone, CONTEXT // 2)
    eventually(lambda: lines)
    engine = engine_of(alone)
    os.kill(alone.process.pid, signal.SIGINT)
    assert alone.process.wait(timeout=PATIENCE_S) == 0
    reader.join(timeout=PATIENCE_S)
    assert '"error"' in lines[-1]
    eventually(lambda: not alive(engine))

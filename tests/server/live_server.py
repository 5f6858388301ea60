"""A live server on a free port over scripted engine processes, in a thread of the test process."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvicorn

from tokenmill.server.app import create_app
from tokenmill.server.cli import listen
from tokenmill.server.config import Config
from tokenmill.server.http_protocol import BoundedHttpProtocol
from tokenmill.server.lifecycle import Server
from tokenmill.server.registry import Registry

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
FAKE_SPEECH = Path(__file__).parent / "fake_speech.py"
MODEL = "toy/echo"
ONE_MODEL = """
version: 1
models:
  toy/echo:
    source: "fake:"
    max_context: 2048
    aliases: [echo]
    deployments:
      greedy: {sampling: {temperature: 0}}
      forced: {force: {temperature: 0, max_tokens: 4}, limits: {max_n: 2, max_logprobs: 3}}
"""


class LiveServer:
    """One server; use as a context manager. `call` runs a function on its event loop."""

    def __init__(
        self,
        config: Config,
        mode: str = "",
        keys: tuple[str, ...] = (),
        engine: Path = FAKE_ENGINE,
        admin_keys: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.registry: Registry
        self.listener = listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self._command = [sys.executable, str(engine), "--mode", mode]
        self._speech_command = [sys.executable, str(FAKE_SPEECH)]
        self._keys = keys
        self._admin_keys = admin_keys
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._server: Server
        self._up = threading.Event()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.registry = Registry(self.config, command=self._command, speech_command=self._speech_command)
        app = create_app(self.registry, self.config.server, self._keys, self._admin_keys)
        self._server = Server(
            uvicorn.Config(
                app, http=BoundedHttpProtocol, lifespan="on", log_config=None, timeout_graceful_shutdown=1
            )
        )
        self._up.set()
        await self._server.serve(sockets=[self.listener])

    def __enter__(self) -> LiveServer:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()

    def complete(self, **fields: object) -> httpx.Response:
        """`POST /v1/completions`."""
        return self.client.post("/v1/completions", json=fields)

    def canary(self) -> str:
        """Text of a greedy request; the same whatever happened before."""
        response = self.complete(model=MODEL, prompt="canary", temperature=0, max_tokens=12)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or holds blocks, in the front end and in every engine."""
        stats = [model.stats for model in self.registry]
        return self.registry.unanswered == 0 and all(
            s is not None and (s.running, s.waiting, s.used_blocks) == (0, 0, 0) for s in stats
        )


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds; fail when it doesn't in this time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def events(response: httpx.Response) -> list[str]:
    """The data of each server-sent event of a finished stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in response.text.split("\n\n") if part]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]

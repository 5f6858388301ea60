"""A live server on a free port over scripted engine processes, in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import uvicorn
from waiting import PATIENCE_S, eventually, paused

from tokenmill.server.app import create_app
from tokenmill.server.cli import listen
from tokenmill.server.config import Config
from tokenmill.server.http_protocol import BoundedHttpProtocol
from tokenmill.server.lifecycle import Server
from tokenmill.server.model import Model
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
HEAD = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


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
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
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
        self._thread.join(timeout=PATIENCE_S)
        assert not self._thread.is_alive()

    def call(self, function: Callable[[], object]) -> None:
        """Run a function on its event loop."""
        self._loop.call_soon_threadsafe(function)

    def complete(self, **fields: object) -> httpx.Response:
        """`POST /v1/completions`."""
        return self.client.post("/v1/completions", json=fields)

    def canary(self) -> str:
        """Text of a greedy request; the same whatever happened before."""
        response = self.complete(model=MODEL, prompt="canary", temperature=0, max_tokens=12)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def open(self, path: str = "/v1/completions", **fields: object) -> socket.socket:
        """A raw connection with a request on its way, for clients that misbehave."""
        body = json.dumps(fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.sendall(HEAD % (path.encode(), len(body)) + body)
        return connection

    @property
    def model(self) -> Model:
        """The only model."""
        (model,) = self.registry
        return model

    @property
    def pid(self) -> int | None:
        """The only model's engine process; None while there is none."""
        return None if self.model._process is None else self.model._process.pid

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The only model's engine does nothing meanwhile: what it is asked stays unanswered however long it takes."""
        eventually(lambda: self.pid is not None)
        pid = self.pid
        assert pid is not None
        with self.unwatched(), paused(pid):
            yield

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """The only model's silence isn't taken for a hang meanwhile, however slow the machine is."""
        rules = self.model._rules
        self.model._rules = msgspec.structs.replace(
            rules, watchdog_s=900, load_silence_s=900, load_watchdog_s=900
        )
        try:
            yield
        finally:
            self.model._rules = rules

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or holds blocks, in the front end and in every engine."""
        stats = [model.stats for model in self.registry]
        return self.registry.unanswered == 0 and all(
            s is not None and (s.running, s.waiting, s.used_blocks) == (0, 0, 0) for s in stats
        )


def events(response: httpx.Response) -> list[str]:
    """The data of each server-sent event of a finished stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in response.text.split("\n\n") if part]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]

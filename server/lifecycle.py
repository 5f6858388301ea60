"""Runs the application until a signal, and ends it: drain, then stop, and at a second signal stop at once.

It also ends by itself when nothing can be served any more: a service manager or a script that waits for the server
sees an exit code then, and a person a prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from tokenmill.server.http_protocol import BoundedHttpProtocol
from tokenmill.server.registry import Registry
from tokenmill.server.stop_signals import stop_signals

logger = logging.getLogger("tokenmill")

INTERRUPT_DRAIN_S = 0.5
"""Ctrl-C and a closed terminal mean now: what runs gets a moment, so that all is over within two seconds."""
FAREWELL_S = 1
"""How long connections may take to close."""


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would stop listening before requests got their 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Lifecycle:
    """One run of the server. `may_recover`: models may still be loaded on demand, so failed ones are no end."""

    def __init__(self, app: FastAPI, registry: Registry, drain_s: float, may_recover: bool) -> None:
        self._registry = registry
        self._drain_s = drain_s
        self._may_recover = may_recover
        self._exit_code = 0
        self._ending: asyncio.Task[None] | None = None
        self._now = asyncio.Event()
        self._server = Server(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=FAREWELL_S,
                backlog=2048,
            )
        )

    async def run(self, listener: socket.socket) -> int:
        """Serve on a bound socket until a signal has been dealt with; the exit code."""
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_signal, number)
        watch = loop.create_task(self._end_when_hopeless())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            watch.cancel()
        return self._exit_code

    async def _end_when_hopeless(self) -> None:
        if self._may_recover:
            return
        await self._registry.hopeless()
        if self._ending is None:
            logger.error("there is no model to serve: none could be loaded")
            self._exit_code = 1
            self._ending = asyncio.create_task(self._end(INTERRUPT_DRAIN_S))

    def _on_signal(self, number: signal.Signals) -> None:
        if self._ending is not None:
            logger.info("stopping at once")
            self._now.set()
            return
        seconds = self._drain_s if number is signal.SIGTERM else INTERRUPT_DRAIN_S
        self._ending = asyncio.get_running_loop().create_task(self._end(seconds))

    async def _end(self, seconds: float) -> None:
        """Let running requests finish for so long, refuse new ones meanwhile, then stop."""
        registry = self._registry
        registry.draining = True
        if registry.unanswered:
            logger.info("draining %d requests for up to %g s", registry.unanswered, seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while registry.unanswered and not self._now.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._now.wait(), 0.05)
        await registry.stop()
        self._server.should_exit = True

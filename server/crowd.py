"""More connections than there are descriptors for: who gets what answer, and what the log hears of it."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.errors import ApiError, unavailable
from tokenmill.server.responses import send_error

logger = logging.getLogger("tokenmill")

PROBE_PATH = "/live"
"""Answered for as long as it is possible: who restarts the process when it isn't would make matters worse."""
QUIET_S = 60.0


def too_many_connections() -> ApiError:
    """503: there are no descriptors for more."""
    return unavailable("the server has as many connections as it can", "too_many_connections", 1)


class Crowd:
    """Says in the log that connections are turned away, once a minute at most."""

    def __init__(self) -> None:
        self._said_at = float("-inf")
        self._since = 0

    def turned_away(self, connections: int) -> None:
        """One more, with so many there."""
        self._since += 1
        now = time.monotonic()
        if now - self._said_at >= QUIET_S:
            logger.warning(
                "no descriptors for more than %d connections; turned away since the last such line: %d. "
                "A higher limit (ulimit -n, LimitNOFILE=) would let more in",
                connections,
                self._since,
            )
            self._said_at, self._since = now, 0


class ProbesOnly:
    """The application of a connection that can't stay: `/live` is answered, all else refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if scope["path"] == PROBE_PATH:
            await self._app(scope, receive, send_last)
        else:
            await send_error(send_last, too_many_connections(), ())

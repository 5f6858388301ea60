"""Ends a handler early: the client leaves, its deadline passes, or what it waits for fails."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

from starlette.types import Receive

from tokenmill.server.errors import ApiError, ClientGone


class Guard:
    """`async with` block that `interrupt` ends with an error, wherever it waits.

    Entered by the task that handles a request. The body has been read, so the next thing to be received is
    the client's leaving. `deadline` is monotonic time; `timed_out` is the error that it brings.
    """

    def __init__(self, receive: Receive, deadline: float, timed_out: ApiError) -> None:
        self._receive = receive
        self._deadline = deadline
        self._timed_out = timed_out
        self._error: Exception | None = None
        self._open = False

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._open = True
        left = max(0.0, self._deadline - time.monotonic())
        self._timer = loop.call_later(left, self.late)
        self._listener = loop.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open = False
        self._timer.cancel()
        self._listener.cancel()
        if self._error is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise self._error from None

    def late(self) -> None:
        """The deadline has passed."""
        self.interrupt(self._timed_out)

    def interrupt(self, error: Exception) -> None:
        """End the block with this error. Only the first one counts.

        Called from callbacks, while the task waits; the task itself raises instead.
        """
        if self._open and self._error is None:
            self._error = error
            self._task.cancel()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.interrupt(ClientGone())

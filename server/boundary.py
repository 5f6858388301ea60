"""The outermost layer of the application: access, error shape, access log.

Pure ASGI: a stream's chunks pass without a queue or a task of their own.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenmill.server.auth import KeyRing
from tokenmill.server.context import RequestContext
from tokenmill.server.errors import ApiError, ClientGone, internal_error
from tokenmill.server.responses import send_error

logger = logging.getLogger("tokenmill.access")
failures = logging.getLogger(__name__)

QUIET_PATHS = frozenset(["/live", "/health", "/metrics"])
"""Probes that would fill the log."""
LONGEST_GUESS = 80
"""Characters of an unknown path that are compared with the known ones."""
CLOSE_ENOUGH = 0.8


class Boundary:
    """Wraps the application: whatever happens inside, the client sees an answer in the documented shape."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(scope)
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                context.answering = True
            await send(message)

        error: ApiError | None = None
        try:
            context.api_key = self._keys.check(scope)
            await self._app(scope, receive, watch)
        except ApiError as raised:
            error = raised
        except ClientGone:
            status = 499
        except Exception:
            failures.exception("%s failed", context.name)
            error = internal_error(context.name)
        if error is not None and not status:
            await send_error(watch, error, context.response_headers())
        if scope["path"] not in QUIET_PATHS:
            logger.info("%s", context.log_line(scope["method"], scope["path"], status))


def http_error(error: HTTPException, path: str, known: Iterable[str]) -> ApiError:
    """The framework's own errors (unknown route, wrong method) in our shape; `known` are the paths there are."""
    if error.status_code == 404:
        # Mostly a base URL with `/v1` missing or twice.
        close = difflib.get_close_matches(path[:LONGEST_GUESS], known, 1, CLOSE_ENOUGH)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else "models answer at /v1/chat/completions and /v1/completions;"
        )
        return ApiError(404, f"there is no such route; {hint} GET /docs lists them", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"this route doesn't take this method; allowed: {allowed or 'others'}"
        return ApiError(
            405, message, code="method_not_allowed", headers={"allow": allowed} if allowed else {}
        )
    return ApiError(error.status_code, str(error.detail))

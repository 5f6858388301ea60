"""The one error of the server, and the shape in which clients see it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

SHOWN = 80
"""Characters of a client's value that a message may repeat."""


class ApiError(Exception):
    """An answer other than 200: `{"error": {"message", "type", "param", "code"}}`, status and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON of the response."""
        return msgspec.json.encode({"error": self._fields()})

    def event(self, with_choices: bool) -> bytes:
        """The same as one server-sent event, for a stream that has begun; it carries the status too."""
        event: dict[str, object] = {"error": {**self._fields(), "status_code": self.status}}
        if with_choices:
            event["choices"] = []
        return b"data: " + msgspec.json.encode(event) + b"\n\n"

    def _fields(self) -> dict[str, object]:
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer. Logged as 499."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: a field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after_s: int) -> ApiError:
    """429: the queue is full."""
    headers = {"retry-after": str(retry_after_s)}
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)


def unavailable(message: str, code: str, retry_after_s: int | None) -> ApiError:
    """503: loading, draining or down. `retry_after_s` None when trying again can't help."""
    headers = {"x-should-retry": "false"} if retry_after_s is None else {"retry-after": str(retry_after_s)}
    return ApiError(503, message, kind="service_unavailable_error", code=code, headers=headers)


def draining() -> ApiError:
    """503: the server takes nothing on any more."""
    return unavailable("the server is shutting down", "draining", 1)


def timed_out(seconds: float, param: str | None) -> ApiError:
    """504: the deadline has passed, the request's own under the name `param`, or else its model's."""
    return ApiError(
        504,
        f"the request took longer than its deadline of {seconds:g} s",
        kind="timeout_error",
        param=param,
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def internal_error(request_id: str) -> ApiError:
    """500: a fault of ours. Says nothing but the id under which the log has it."""
    return ApiError(
        500,
        f"the server failed on this request; its log has the reason under {request_id}",
        kind="server_error",
        code="internal_error",
    )


def shorten(value: object) -> str:
    """A client's value as JSON, cut to a length that is fit for a message."""
    try:
        text = value if isinstance(value, str) and len(value) > SHOWN else msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"

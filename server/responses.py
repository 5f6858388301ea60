"""Plain responses: as objects for routes, and straight into the ASGI protocol."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from starlette.responses import Response
from starlette.types import Send

from tokenmill.server.errors import ApiError

Headers = Iterable[tuple[bytes, bytes]]


def json_response(value: object, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def send_json(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """A whole JSON response."""
    own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Headers) -> None:
    """An error in its shape, with the headers that it brings."""
    own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
    await send_json(send, error.status, error.body(), [*own, *headers])

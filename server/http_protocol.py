"""uvicorn's HTTP protocol with bounds on a request's headers, and on what clients leave unread."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenmill.server.crowd import Crowd, ProbesOnly, too_many_connections
from tokenmill.server.descriptors import Room, room
from tokenmill.server.errors import ApiError

HEADER_TIMEOUT_S = 20.0
PROBE_TIMEOUT_S = 2.0
"""The same for connections that there is no room for."""
MAX_HEADER_BYTES = 64 << 10
STALL_S = 10.0
"""A connection that is being closed is cut when its client has read nothing for so long."""


def _refusal(status_line: bytes, error: ApiError) -> bytes:
    """A whole response in the documented error shape, for what never becomes a request."""
    body = error.body()
    own = {"content-type": "application/json", "connection": "close", "content-length": str(len(body))}
    lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in (own | error.headers).items()]
    return b"HTTP/1.1 %b\r\n%b\r\n%b" % (status_line, b"".join(lines), body)


class ClosingTransport:
    """A transport whose `close` comes to an end.

    Closing waits until everything is written; a client that doesn't read would keep its connection, and the
    rest of an answer in memory, for as long as it likes. One that reads slowly gets all of it.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._transport.is_closing():
            self._transport.close()
            self._watch(self._transport.get_write_buffer_size())

    def _watch(self, unread: int) -> None:
        if unread:
            self._loop.call_later(STALL_S, self._cut_if_stalled, unread)

    def _cut_if_stalled(self, before: int) -> None:
        unread = self._transport.get_write_buffer_size()
        if unread >= before:
            self._transport.abort()
        else:
            self._watch(unread)


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections that don't finish their headers, and refuses headers without end; and connections where
    there are no descriptors for more.

    The timer runs from the connection's start, and again from the first byte of each later request.
    """

    _crowd = Crowd()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes = 0
        self._in_headers = True
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_timeout_s = HEADER_TIMEOUT_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, ClosingTransport(transport, self.loop)))
        given = room(transport.get_extra_info("socket").fileno())
        if given is not Room.ANY:
            self._crowd.turned_away(len(self.connections))
            self._header_timeout_s = PROBE_TIMEOUT_S
            self.app = ProbesOnly(self.app)
        if given is Room.NONE:
            self.transport.write(_refusal(b"503 Service Unavailable", too_many_connections()))
            self.transport.close()
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            error = ApiError(400, f"the request line and headers are larger than {MAX_HEADER_BYTES} bytes")
            self.transport.write(_refusal(b"431 Request Header Fields Too Large", error))
            self.transport.close()

    def on_message_begin(self) -> None:
        self._in_headers = True
        if self._header_timer is None:
            self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_refusal(b"400 Bad Request", ApiError(400, "this isn't a valid HTTP request")))
        self.transport.close()

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(self._header_timeout_s, self._close_idle)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_idle(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.close()

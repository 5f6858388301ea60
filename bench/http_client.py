"""A client for streamed completions that costs little, since it often shares its cores with the server.

One connection carries one request after another. Bytes are taken as they come, each event is stamped once and
decoded by msgspec into the few fields that count: some microseconds a token, no matter how many streams.

    socket ─▶ Connection.data_received ─▶ head ─▶ body (chunked, sized or until close) ─▶ SSE events ─▶ Reply
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit

import msgspec

from tokenmill.bench.reply import Reply

HEAD_END = b"\r\n\r\n"
EVENT_END = b"\n\n"
GET_TIMEOUT = 10.0


class Client:
    """Connections to one server, kept open between requests."""

    def __init__(
        self, base_url: str, headers: Mapping[str, str] | None = None, timeout: float = 600.0
    ) -> None:
        """`timeout` seconds for each whole request. Raises ValueError for what is no plain HTTP URL."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no http or https URL")
        if parts.username or parts.password:
            raise ValueError(f"{parts.hostname}: a key belongs into --api-key-env, not into the URL")
        self.base_url = base_url.rstrip("/")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        lines = {"Host": parts.netloc, "Accept": "*/*", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._timeout = timeout
        self._idle: list[_Connection] = []

    async def stream(self, path: str, body: bytes, began: float | None = None) -> Reply:
        """POST `body` and follow the stream to its end. Faults are in the reply's `error`, never raised.

        `began` is when the request should have left, for loads that arrive on a schedule.
        """
        request = self._request("POST", path, body)
        reply = Reply(time.perf_counter() if began is None else began)
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange(request, reply)
        except TimeoutError:
            reply.error = f"no end after {self._timeout:g} s"
        except OSError as error:
            reply.error = f"{self.base_url}: {error.strerror or error}"
        reply.ended = time.perf_counter()
        if reply.error is None and not reply.arrivals:
            reply.error = "the stream ended without any output"
        return reply

    async def get(self, path: str) -> bytes:
        """The body of a GET. Raises OSError when the server can't be reached or doesn't answer with 200."""
        reply = Reply(time.perf_counter())
        try:
            async with asyncio.timeout(GET_TIMEOUT):
                body = await self._exchange(self._request("GET", path, b""), reply)
        except OSError as error:
            raise OSError(f"{self.base_url} can't be reached: {error.strerror or 'no answer'}") from None
        if reply.status != 200:
            raise OSError(f"{self.base_url}: GET {path} answered {reply.status}")
        return body

    def close(self) -> None:
        """Close the connections that are open."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode("latin-1") + b"\r\n" + body

    async def _exchange(self, request: bytes, reply: Reply) -> bytes:
        """Send on an idle connection or a new one; an idle one that the server has closed is no fault."""
        while self._idle:
            connection = self._idle.pop()
            if await connection.exchange(request, reply):
                return self._settle(connection)
        connection = await self._connect()
        if not await connection.exchange(request, reply):
            raise ConnectionResetError("the server closed the connection without an answer")
        return self._settle(connection)

    def _settle(self, connection: _Connection) -> bytes:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return connection.body

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection


class _Connection(asyncio.Protocol):
    """One exchange at a time: parses the answer into the current reply."""

    def __init__(self) -> None:
        self.body = b""
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._over: asyncio.Future[bool] | None = None
        self._data = bytearray()
        self._payload = bytearray()
        self._in_head = True
        self._chunked = self._streaming = self._last = self._keep = False
        self._left: int | None = None

    async def exchange(self, request: bytes, reply: Reply) -> bool:
        """Send, and wait for the whole answer; False when the connection closed before any of it came."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._reply, self._over = reply, asyncio.get_running_loop().create_future()
        self._data.clear()
        self._payload.clear()
        self._in_head, self.reusable = True, False
        self._transport.write(request)
        try:
            return await self._over
        except BaseException:
            self.close()
            raise
        finally:
            self._over = self._reply = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._over is None or self._over.done() or self._reply is None:
            return
        if self._in_head and not self._data:
            self._over.set_result(False)
        elif not self._in_head and not self._chunked and self._left is None:
            self._finish()
        else:
            self._reply.error = "the connection broke off"
            self._finish()

    def data_received(self, data: bytes) -> None:
        if self._over is None or self._over.done() or self._reply is None:
            return
        now = time.perf_counter()
        self._data += data
        try:
            if self._in_head and not self._take_head(self._reply):
                return
            whole = self._take_chunks() if self._chunked else self._take_sized()
            if self._streaming:
                self._take_events(self._reply, now)
        except (ValueError, msgspec.MsgspecError) as error:
            self._reply.error = f"not understood: {error}"
            self._finish()
            return
        if whole:
            self.reusable = self._keep
            self._finish()

    # the answer, part by part

    def _take_head(self, reply: Reply) -> bool:
        end = self._data.find(HEAD_END)
        if end < 0:
            return False
        status, *lines = bytes(self._data[:end]).decode("latin-1").split("\r\n")
        del self._data[: end + len(HEAD_END)]
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        reply.status = int(status.split(" ", 2)[1])
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = 0 if self._chunked else None
        if not self._chunked and "content-length" in headers:
            self._left = int(headers["content-length"])
        self._last = False
        self._keep = headers.get("connection", "").lower() != "close"
        self._streaming = headers.get("content-type", "").startswith("text/event-stream")
        self._in_head = False
        return True

    def _take_sized(self) -> bool:
        self._payload += self._data
        if self._left is not None:
            self._left -= len(self._data)
        self._data.clear()
        return self._left is not None and self._left <= 0

    def _take_chunks(self) -> bool:
        """Move the chunks that are here to the payload; True after the last, empty one.

        `_left` is what is still to come of a chunk, with the line end behind it.
        """
        data, place = self._data, 0
        while place < len(data) and not (self._last and not self._left):
            if self._left:
                part = min(self._left, len(data) - place)
                self._payload += data[place : place + min(part, max(0, self._left - 2))]
                self._left -= part
                place += part
                continue
            end = data.find(b"\r\n", place)
            if end < 0:
                break
            size = int(data[place:end].partition(b";")[0], 16)
            self._left, self._last = size + 2, size == 0
            place = end + 2
        del data[:place]
        return self._last and not self._left

    def _take_events(self, reply: Reply, now: float) -> None:
        payload = self._payload
        if b"\r" in payload:
            payload[:] = payload.replace(b"\r", b"")
        start = 0
        while (end := payload.find(EVENT_END, start)) >= 0:
            for line in payload[start:end].split(b"\n"):
                if line.startswith(b"data:"):
                    reply.take_event(bytes(line[5:]).strip(), now)
            start = end + len(EVENT_END)
        del payload[:start]

    def _finish(self) -> None:
        reply, over = self._reply, self._over
        if reply is not None and over is not None and not over.done():
            self.body = bytes(self._payload)
            reply.close(self.body)
            over.set_result(True)

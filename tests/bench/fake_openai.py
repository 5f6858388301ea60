"""A small OpenAI-compatible server on a socket of its own, with the habits, good and bad, of real ones."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """Answers each completion with `max_tokens` tokens, `tokens_per_event` an event.

    `piece` bytes go out at a time (0: a whole answer at once), so that every border of the protocol is cut
    somewhere. `framing` is how the body ends: chunked, by its length, or by closing.
    """

    framing: str = "chunked"
    piece: int = 0
    line_end: str = "\n"
    tokens_per_event: int = 1
    most_tokens: int = 1 << 30
    """Answers end there, whatever was asked for."""
    usage: bool = True
    fail_with: int | None = None
    break_after: int | None = None
    """Close the connection after so many events."""
    error_event: bool = False
    close_between: bool = False
    """Promise to keep the connection, and close it after each answer."""
    hold: asyncio.Event | None = None
    """Completions wait for it."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    connections: int = 0
    under_way: int = 0
    most_under_way: int = 0
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        """Serve on a free port of 127.0.0.1."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    @contextmanager
    def in_thread(self) -> Iterator[FakeServer]:
        """The same for a test whose code under test runs an event loop of its own."""
        started, over = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            async with self.running():
                started.set()
                await over.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.headers.append(head)
                lengths = [
                    line.split(":")[1]
                    for line in head.split("\r\n")
                    if line.lower().startswith("content-length")
                ]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                if not await self._answer(head.split(" ")[1], body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Write one answer; False when the connection shall be closed."""
        if path == "/v1/models":
            return await self._send(writer, 200, "application/json", b'{"data": [{"id": "fake/model"}]}')
        request = json.loads(body)
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.fail_with is not None:
                error = {"error": {"message": "no, thank you", "type": "t", "param": None, "code": None}}
                return await self._send(
                    writer, self.fail_with, "application/json", json.dumps(error).encode()
                )
            events = self._events(request, chat=path.endswith("chat/completions"))
            if self.break_after is not None:
                text = "".join(events[: self.break_after]).encode()
                writer.write(_head(200, "text/event-stream", "Transfer-Encoding: chunked") + _chunk(text))
                await writer.drain()
                return False
            return await self._send(writer, 200, "text/event-stream", *(event.encode() for event in events))
        finally:
            self.under_way -= 1

    def _events(self, request: dict[str, Any], chat: bool) -> list[str]:
        total = min(request["max_tokens"], self.most_tokens)
        data: list[dict[str, Any]] = []
        if chat:
            data.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for start in range(0, total, self.tokens_per_event):
            text = " tö" * min(self.tokens_per_event, total - start)
            said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            data.append({"choices": [{"index": 0, **said, "finish_reason": None}], "usage": None})
        if self.error_event:
            data = [data[0], {"error": {"message": "the engine went away"}}]
        else:
            said = {"delta": {}} if chat else {"text": ""}
            data.append({"choices": [{"index": 0, **said, "finish_reason": "length"}]})
            if self.usage and request.get("stream_options", {}).get("include_usage"):
                prompt = request.get("prompt") or request["messages"][0]["content"].split()
                data.append(
                    {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": total}}
                )
        end = self.line_end * 2
        return [f"data: {json.dumps(event)}{end}" for event in data] + [f"data: [DONE]{end}"]

    async def _send(self, writer: asyncio.StreamWriter, status: int, kind: str, *parts: bytes) -> bool:
        whole = b"".join(parts)
        if self.framing == "chunked":
            answer = _head(status, kind, "Transfer-Encoding: chunked")
            answer += b"".join(_chunk(part) for part in parts) + b"0\r\n\r\n"
        elif self.framing == "length":
            answer = _head(status, kind, f"Content-Length: {len(whole)}") + whole
        else:
            answer = _head(status, kind, "Connection: close") + whole
        step = self.piece or len(answer)
        for start in range(0, len(answer), step):
            writer.write(answer[start : start + step])
            await writer.drain()
            if self.piece:
                await asyncio.sleep(0)
        return self.framing != "close" and not self.close_between


def _head(status: int, kind: str, framing: str) -> bytes:
    return f"HTTP/1.1 {status} Fine\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n".encode()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"

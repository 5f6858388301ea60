"""The end of a stream comes even when all is done while an earlier chunk is being sent."""

from __future__ import annotations

import asyncio
from typing import Any

from tokenmill.server.completions import Stream
from tokenmill.server.context import RequestContext


class Scripted:
    """A generation and its writer at once; its choices are what they write."""

    def __init__(self) -> None:
        self.done = False
        self.blocked = False
        self.waiting = [[b"first "]]

    async def news(self) -> list[bytes]:
        return self.waiting.pop(0)

    def chunks(self, choices: list[bytes]) -> bytes:
        return b"".join(choices)

    def end(self, with_done: bool) -> bytes:
        return b"end" if with_done else b""


def test_what_comes_while_a_chunk_is_sent_is_the_next_chunk() -> None:
    scripted: Any = Scripted()
    context = RequestContext({"type": "http", "headers": []})
    context.answering = True
    sent: list[Any] = []

    async def send(message: Any) -> None:
        assert scripted.blocked
        sent.append((message["body"], message["more_body"]))
        if not scripted.done:
            scripted.waiting.append([b"last "])
            scripted.done = True

    asyncio.run(Stream(send, context).run(scripted, scripted, [], with_done=True))
    assert sent == [(b"first ", True), (b"last end", False)]

"""A connection that is being closed ends, and not before its client had the time to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenmill.server.http_protocol import ClosingTransport


class Wire:
    """A transport and the loop that it lives on: what is unread at each look, and timers run by hand."""

    def __init__(self, *unread: int) -> None:
        self.unread = iter(unread)
        self.due: list[Callable[[], None]] = []
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.calls.append("write")

    def is_closing(self) -> bool:
        return "close" in self.calls

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def get_write_buffer_size(self) -> int:
        return next(self.unread)

    def call_later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self.due.append(lambda: call(*arguments))


@pytest.mark.parametrize(
    ("unread", "calls"),
    [
        ((0,), ["close"]),
        ((300, 0), ["close"]),
        ((300, 200, 100, 0), ["close"]),
        ((300, 300), ["close", "abort"]),
        ((300, 200, 200), ["close", "abort"]),
    ],
)
def test_only_who_reads_nothing_is_cut(unread: tuple[int, ...], calls: list[str]) -> None:
    wire = Wire(*unread)
    transport = ClosingTransport(wire, wire)  # type: ignore[arg-type]
    transport.close()
    transport.close()
    while wire.due:
        wire.due.pop()()
    assert wire.calls == calls
    assert list(wire.unread) == []


def test_all_else_is_the_transport_itself() -> None:
    wire = Wire()
    transport = ClosingTransport(wire, wire)  # type: ignore[arg-type]
    transport.write(b"x")
    transport.abort()
    assert wire.calls == ["write", "abort"]

"""The engine process's end of the socket, where the front end has gone."""

from __future__ import annotations

import os
import socket

import pytest

from tokenmill.engine.link import Link, Outbox
from tokenmill.engine.messages import Drain, encode_frame, to_engine_decoder


class Ended(BaseException):
    """What `os._exit` does here."""


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes that the process would have ended with."""
    given: list[int] = []

    def end(code: int) -> None:
        given.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    return given


def read_until_the_end(ours: socket.socket, theirs: socket.socket) -> None:
    ours.close()
    with theirs, pytest.raises(Ended):
        Link(theirs, to_engine_decoder, Outbox()).read()


def test_a_closed_socket_ends_the_process(codes: list[int]) -> None:
    read_until_the_end(*socket.socketpair())
    assert codes == [0]


def test_a_socket_closed_over_unread_news_ends_it_as_well(codes: list[int]) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"news")
    read_until_the_end(ours, theirs)
    assert codes == [0]


def test_half_a_frame_is_no_message(codes: list[int]) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(encode_frame(Drain())[:-1])
    read_until_the_end(ours, theirs)
    assert codes == [0]

"""The benchmark's client against a server that frames, cuts and fails in every way."""

from __future__ import annotations

import asyncio
import socket

import pytest
from fake_openai import FakeServer

from tokenmill.bench.http_client import Client
from tokenmill.bench.load import CHAT, Target, request_body
from tokenmill.bench.reply import Reply
from tokenmill.bench.workload import Job

PATH = "/v1/completions"


def ask(
    server: FakeServer, count: int = 1, path: str = PATH, timeout: float = 120.0, tokens: int = 5
) -> list[Reply]:
    """The replies to `count` requests, one after the other, on one client."""

    async def talk() -> list[Reply]:
        async with server.running():
            client = Client(server.url, timeout=timeout)
            prompt: str | list[int] = "three little words" if path == CHAT else [7, 8, 9]
            body = request_body(Target("fake", client, path, "fake/model"), Job(prompt, 3, tokens))
            try:
                return [await client.stream(path, body) for _ in range(count)]
            finally:
                client.close()

    return asyncio.run(talk())


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("piece", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_framing_cut_anywhere(framing: str, piece: int, line_end: str) -> None:
    server = FakeServer(framing=framing, piece=piece, line_end=line_end)
    for reply in ask(server, count=2):
        assert reply.error is None
        assert reply.status == 200
        assert len(reply.arrivals) == 5
        assert (reply.prompt_tokens, reply.completion_tokens) == (3, 5)
        assert reply.finish_reason == "length"
    assert server.connections == (2 if framing == "close" else 1)


@pytest.mark.parametrize("piece", [0, 5])
def test_chat_counts_no_event_without_content(piece: int) -> None:
    (reply,) = ask(FakeServer(piece=piece), path=CHAT)
    assert reply.error is None
    assert len(reply.arrivals) == 5
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 5)


def test_several_tokens_in_an_event_are_counted_by_usage() -> None:
    (reply,) = ask(FakeServer(tokens_per_event=3), tokens=7)
    assert len(reply.arrivals) == 3
    assert reply.completion_tokens == 7


def test_without_usage_events_are_counted() -> None:
    (reply,) = ask(FakeServer(usage=False))
    assert reply.completion_tokens == 5


def test_times_are_in_order() -> None:
    (reply,) = ask(FakeServer(piece=16))
    assert reply.began <= reply.arrivals[0] <= reply.arrivals[-1] <= reply.ended
    assert reply.first <= reply.whole
    assert len(reply.gaps) == 4
    assert sum(reply.gaps) == pytest.approx(reply.whole - reply.first)
    assert reply.per_token == pytest.approx(sum(reply.gaps) / 4)


def test_a_connection_that_closes_between_requests_is_no_fault() -> None:
    server = FakeServer(close_between=True)
    assert [reply.error for reply in ask(server, count=3)] == [None, None, None]
    assert server.connections == 3


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_an_error_status_brings_its_message(framing: str) -> None:
    (reply,) = ask(FakeServer(framing=framing, fail_with=429))
    assert reply.status == 429
    assert reply.error == "status 429: no, thank you"
    assert reply.arrivals == []


def test_an_error_in_the_stream_is_an_error() -> None:
    (reply,) = ask(FakeServer(error_event=True))
    assert reply.error == "the engine went away"


def test_a_broken_connection_is_an_error() -> None:
    (reply,) = ask(FakeServer(break_after=2))
    assert reply.error == "the connection broke off"
    assert len(reply.arrivals) == 2


def test_a_server_that_never_answers_runs_into_the_timeout() -> None:
    (reply,) = ask(FakeServer(hold=asyncio.Event()), timeout=0.05)
    assert reply.error == "no end after 0.05 s"


def test_nobody_there_is_an_error() -> None:
    with socket.socket() as deaf:  # its port is nobody else's, and it doesn't listen
        deaf.bind(("127.0.0.1", 0))
        reply = asyncio.run(Client(f"http://127.0.0.1:{deaf.getsockname()[1]}").stream(PATH, b"{}"))
    assert reply.error is not None
    assert reply.error.startswith("http://127.0.0.1:")


def test_get_says_who_does_not_answer() -> None:
    async def talk() -> bytes:
        server = FakeServer()
        async with server.running():
            client = Client(server.url + "/v1")
            assert b"fake/model" in await client.get("/v1/models")
            client.close()
        return await client.get("/v1/models")

    with pytest.raises(OSError, match=r"http://127.0.0.1:\d+/v1 can't be reached"):
        asyncio.run(talk())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no http or https URL"):
        Client(url)


def test_a_url_with_a_key_in_it_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValueError, match="--api-key-env") as refusal:
        Client("https://me:sesame@host/v1")
    assert "sesame" not in str(refusal.value)


def test_headers_and_prefix_reach_the_server() -> None:
    async def talk(server: FakeServer) -> None:
        async with server.running():
            client = Client(server.url + "/team/v1/", {"Authorization": "Bearer k"})
            await client.stream(PATH, b'{"max_tokens": 1}')
            client.close()

    server = FakeServer(usage=False)
    asyncio.run(talk(server))
    assert server.headers[0].startswith("POST /team/v1/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer k\r\n" in server.headers[0]

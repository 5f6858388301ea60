"""Closed and open loops against a fake server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from fake_openai import FakeServer

from tokenmill.bench.http_client import Client
from tokenmill.bench.load import (
    CHAT,
    Outcome,
    Target,
    closed_loop,
    latencies,
    open_loop,
    poisson_arrivals,
    request_body,
)
from tokenmill.bench.reply import Reply
from tokenmill.bench.workload import Job, Workload

PATH = "/v1/completions"


def under_load(server: FakeServer, drive: Callable[[Target], Awaitable[Outcome]]) -> Outcome:
    async def talk() -> Outcome:
        async with server.running():
            client = Client(server.url)
            outcome = await drive(Target("fake", client, PATH, "fake/model"))
            client.close()
            return outcome

    return asyncio.run(talk())


def bodies(target: Target, count: int) -> list[bytes]:
    return [request_body(target, job) for job in Workload(prompt_tokens=6, output_tokens=4).jobs(count, 0)]


@pytest.mark.parametrize(("clients", "count"), [(1, 5), (3, 10), (8, 3)])
def test_closed_loop_keeps_its_clients_busy(clients: int, count: int) -> None:
    """The server holds all answers until as many requests have come as may be under way."""
    server = FakeServer(hold=asyncio.Event(), piece=32)

    async def drive(target: Target) -> Outcome:
        task = asyncio.ensure_future(closed_loop(target, bodies(target, count), clients, seen.append))
        while server.under_way < min(clients, count):
            await asyncio.sleep(0)
        assert server.hold is not None
        server.hold.set()
        return await task

    seen: list[Reply] = []
    outcome = under_load(server, drive)
    assert outcome.failures == []
    assert outcome.lengths == [(6, 4)] * count
    assert len(seen) == len(server.requests) == count
    assert server.most_under_way == min(clients, count)
    assert server.connections == min(clients, count)


def test_open_loop_does_not_wait_for_answers() -> None:
    server = FakeServer(hold=asyncio.Event())

    async def drive(target: Target) -> Outcome:
        task = asyncio.ensure_future(open_loop(target, bodies(target, 6), [0.0] * 6, lambda reply: None))
        while server.under_way < 6:
            await asyncio.sleep(0)
        assert server.hold is not None
        server.hold.set()
        return await task

    outcome = under_load(server, drive)
    assert server.most_under_way == 6
    assert outcome.lengths == [(6, 4)] * 6


def test_open_loop_counts_from_the_arrival() -> None:
    """Requests that all arrived 5 s ago have waited at least 5 s by the time they are answered."""

    async def drive(target: Target) -> Outcome:
        return await open_loop(target, bodies(target, 3), [-5.0] * 3, lambda reply: None)

    outcome = under_load(FakeServer(), drive)
    assert min(reply.first for reply in outcome.good) >= 5.0


def test_failed_requests_are_counted_apart() -> None:
    async def drive(target: Target) -> Outcome:
        return await closed_loop(target, bodies(target, 4), 2, lambda reply: None)

    outcome = under_load(FakeServer(fail_with=503), drive)
    assert outcome.good == []
    assert outcome.failures == ["status 503: no, thank you"] * 4
    assert outcome.output_per_s == 0.0
    assert latencies([outcome])["TTFT"].count == 0


def test_rates_and_latencies_by_hand() -> None:
    replies = [
        Reply(began=0.0, arrivals=[1.0, 1.5, 2.5], completion_tokens=3, prompt_tokens=9),
        Reply(began=1.0, arrivals=[3.0], completion_tokens=1, prompt_tokens=9),
    ]
    outcome = Outcome(replies, seconds=2.0)
    assert outcome.output_per_s == 2.0
    found = latencies([outcome])
    assert (found["TTFT"].mean, found["TTFT"].largest) == (1500.0, 2000.0)
    assert (found["ITL"].count, found["ITL"].mean) == (2, 750.0)
    assert (found["TPOT"].count, found["TPOT"].mean) == (1, 750.0)
    assert found["E2E"].p50 == 2250.0


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(rate=4.0, count=4001, seed=1)
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.05)
    # Exponential: as far from the mean as the mean itself, and memoryless.
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, rel=0.05)
    assert arrivals == poisson_arrivals(4.0, 4001, 1)
    assert arrivals != poisson_arrivals(4.0, 4001, 2)
    assert poisson_arrivals(4.0, 0, 1) == []


def test_request_bodies() -> None:
    client = Client("http://127.0.0.1:1")
    completion = Target("a", client, PATH, "m", {"ignore_eos": None, "seed": 5})
    chat = Target("b", client, CHAT, "m")
    body = json.loads(request_body(completion, Job([1, 2], 2, 7)))
    assert body["prompt"] == [1, 2]
    assert (body["model"], body["max_tokens"], body["seed"], body["stream"]) == ("m", 7, 5, True)
    assert "ignore_eos" not in body
    body = json.loads(request_body(chat, Job("so many words", 3, 7)))
    assert body["messages"] == [{"role": "user", "content": "so many words"}]
    assert body["ignore_eos"] is True
    assert "prompt" not in body

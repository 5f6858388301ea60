"""Load on a server: requests that follow each other (closed loop) or arrive by the clock (open loop).

closed   each of N clients sends its next request when the last one is answered: N are always under way
open     requests arrive as a Poisson process, whether the server keeps up or not; each one's time counts
         from its arrival, so a queue shows in the latencies
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenmill.bench.distribution import Distribution, describe
from tokenmill.bench.http_client import Client
from tokenmill.bench.reply import Reply
from tokenmill.bench.workload import Job

CHAT = "/v1/chat/completions"

OnReply = Callable[[Reply], object]


@dataclass(frozen=True, slots=True)
class Target:
    """One server under load: where, by which model name, and with which fields beside or instead of ours."""

    name: str
    client: Client
    path: str
    model: str
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of requests came to. `seconds` from the first request to the last answer."""

    replies: Sequence[Reply]
    seconds: float

    @property
    def good(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.error is None]

    @property
    def failures(self) -> list[str]:
        """What went wrong, one line a failed request."""
        return [reply.error for reply in self.replies if reply.error is not None]

    @property
    def output_per_s(self) -> float:
        """Generated tokens a second; those of failed requests don't count."""
        return sum(reply.completion_tokens for reply in self.good) / self.seconds

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of the answered requests, by the server's count."""
        return [(reply.prompt_tokens, reply.completion_tokens) for reply in self.good]


def request_body(target: Target, job: Job) -> bytes:
    """The JSON of one streamed, greedy request of exactly the job's length."""
    body: dict[str, object] = {"model": target.model}
    if target.path.endswith(CHAT):
        body["messages"] = [{"role": "user", "content": job.prompt}]
    else:
        body["prompt"] = job.prompt
    body |= {
        "max_tokens": job.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    merged = body | dict(target.extra)
    return json.dumps({name: value for name, value in merged.items() if value is not None}).encode()


async def closed_loop(target: Target, bodies: Sequence[bytes], clients: int, on_reply: OnReply) -> Outcome:
    """Send all `bodies`, `clients` at a time."""
    waiting = iter(bodies)
    replies: list[Reply] = []

    async def work() -> None:
        for body in waiting:
            reply = await target.client.stream(target.path, body)
            replies.append(reply)
            on_reply(reply)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(clients, len(bodies))):
            group.create_task(work())
    return Outcome(replies, time.perf_counter() - began)


async def open_loop(
    target: Target, bodies: Sequence[bytes], offsets: Sequence[float], on_reply: OnReply
) -> Outcome:
    """Send each body `offsets` seconds after the start."""

    async def send(body: bytes, due: float) -> Reply:
        await asyncio.sleep(due - time.perf_counter())
        reply = await target.client.stream(target.path, body, began=due)
        on_reply(reply)
        return reply

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(send(body, began + offset))
            for body, offset in zip(bodies, offsets, strict=True)
        ]
    return Outcome([task.result() for task in tasks], time.perf_counter() - began)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests arrive, `rate` a second on average; the first one at once."""
    rng = random.Random(seed)
    arrivals = [0.0]
    while len(arrivals) < count:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    return arrivals[:count]


def latencies(outcomes: Sequence[Outcome]) -> dict[str, Distribution]:
    """Milliseconds over all answered requests: first token, gaps, mean a token after it, whole answer."""
    replies = [reply for outcome in outcomes for reply in outcome.good]
    return {
        "TTFT": describe(1e3 * reply.first for reply in replies),
        "ITL": describe(1e3 * gap for reply in replies for gap in reply.gaps),
        "TPOT": describe(1e3 * reply.per_token for reply in replies if reply.completion_tokens > 1),
        "E2E": describe(1e3 * reply.whole for reply in replies),
    }

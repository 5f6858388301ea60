"""Many clients at once through the public openai client: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import asyncio
import random

import openai
import pytest
from server_process import SMOLLM2, TINY, Server
from waiting import eventually

PROMPTS = [
    "The mill",
    "Grain is",
    "Once upon a time",
    "def grind(",
    "Water turns the wheel",
    "1, 2, 3,",
    "a",
    "Über",
]


def settings(number: int) -> dict[str, object]:
    """A different request for each number, seeded so that it can be asked for again."""
    generator = random.Random(number)
    return {
        "prompt": generator.choice(PROMPTS) * generator.randrange(1, 6),
        "max_tokens": generator.randrange(1, 80),
        "temperature": generator.choice([0, 0.5, 1, 1.5]),
        "top_p": generator.choice([1, 0.9]),
        "presence_penalty": generator.choice([0, 0.5]),
        "seed": number,
        "stop": generator.choice([None, ["e"], ["xyz", "\n"]]),
        "logprobs": generator.choice([None, 2]),
    }


async def streamed(client: openai.AsyncOpenAI, model: str, number: int) -> tuple[str, str | None]:
    text, reason = "", None
    stream = await client.completions.create(model=model, stream=True, **settings(number))  # type: ignore[call-overload]
    async for chunk in stream:
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


async def whole(client: openai.AsyncOpenAI, model: str, number: int) -> tuple[str, str | None]:
    answer = await client.completions.create(model=model, **settings(number))  # type: ignore[call-overload]
    return answer.choices[0].text, answer.choices[0].finish_reason


def client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)


def test_64_streams_equal_their_plain_twins(server: Server) -> None:
    async def run() -> None:
        async with client_of(server) as client:
            streams = await asyncio.gather(*(streamed(client, TINY, i) for i in range(64)))
            twins = await asyncio.gather(*(whole(client, TINY, i) for i in range(64)))
        assert streams == twins
        assert all(reason in ("stop", "length") for _, reason in streams)

    asyncio.run(run())


@pytest.mark.smollm2
def test_16_streams_of_smollm2_finish(server: Server) -> None:
    async def run() -> None:
        async with client_of(server) as client:
            streams = await asyncio.gather(*(streamed(client, SMOLLM2, i) for i in range(16)))
        assert all(reason in ("stop", "length") for _, reason in streams)
        assert sum(len(text) for text, _ in streams) > 100

    asyncio.run(run())


def test_20_clients_that_leave_midway_leave_nothing_behind(server: Server) -> None:
    async def leave(client: openai.AsyncOpenAI, number: int) -> None:
        stream = await client.completions.create(
            model=TINY, prompt="The mill " * 10, max_tokens=400, stream=True, seed=number, n=2,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        seen = 0
        async for _ in stream:
            seen += 1
            if seen > number:
                break
        await stream.close()

    async def run() -> None:
        async with client_of(server) as client:
            await asyncio.gather(*(leave(client, i) for i in range(20)))

    asyncio.run(run())
    for held in ("running", "waiting", "used_blocks"):
        eventually(lambda name=f"tokenmill_{held}": server.metric(name) == 0)

"""Streams: chunks that add up to the whole answer, their usage, their end, and their errors."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from fake_engine import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import MODEL, LiveServer, events

from tokenmill.engine.tokenizer import Tokenizer

TOY = Tokenizer(TOKENIZER)


def chunks(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    response = server.complete(stream=True, **fields)
    assert response.status_code == 200, response.text
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(event) for event in data]


def test_chunks_share_id_and_shape(server: LiveServer) -> None:
    parts = chunks(server, prompt="abc", max_tokens=5)
    assert {part["id"] for part in parts} == {parts[0]["id"]}
    assert {part["object"] for part in parts} == {"text_completion"}
    assert {part["model"] for part in parts} == {MODEL}
    assert all(set(part["choices"][0]) == {"index", "text", "logprobs", "finish_reason"} for part in parts)
    assert all("usage" not in part for part in parts)
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    assert "".join(part["choices"][0]["text"] for part in parts) == "abcab"


def test_text_of_a_chunk_is_whole_utf8(server: LiveServer) -> None:
    texts = [part["choices"][0]["text"] for part in chunks(server, prompt="€", max_tokens=9)]
    assert "".join(texts) == "€€€"
    assert set("".join(texts)) == {"€"}


def test_nothing_of_a_stop_is_streamed(server: LiveServer) -> None:
    parts = chunks(server, prompt="abcdefgh", stop="cdefg", max_tokens=20)
    texts = [part["choices"][0]["text"] for part in parts]
    assert "".join(texts) == "ab"
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_choices_interleave_and_each_ends_once(server: LiveServer) -> None:
    parts = chunks(server, prompt=["abc", "xyz"], n=2, max_tokens=4)
    texts = dict.fromkeys(range(4), "")
    ended: list[int] = []
    for part in parts:
        (choice,) = part["choices"]
        assert choice["index"] not in ended
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ended.append(choice["index"])
    assert texts == {0: "abca", 1: "acba", 2: "xyzx", 3: "xzyx"}
    assert sorted(ended) == [0, 1, 2, 3]


def test_usage_at_the_end(server: LiveServer) -> None:
    *parts, last = chunks(server, prompt="abc", n=2, max_tokens=3, stream_options={"include_usage": True})
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    whole = server.complete(prompt="abc", n=2, max_tokens=3).json()["usage"]
    assert last["usage"] == whole


def test_continuous_usage(server: LiveServer) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True, "include_obfuscation": False}
    parts = chunks(server, prompt="abc", max_tokens=6, stream_options=options)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert parts[-1]["choices"] == []


def test_echo_comes_first(server: LiveServer) -> None:
    parts = chunks(server, prompt="abc", n=2, echo=True, max_tokens=3, logprobs=1)
    for index in (0, 1):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert own[0]["text"].startswith("abc")
        assert own[0]["logprobs"]["tokens"][:4] == ["<s>", "a", "b", "c"]
        assert own[0]["logprobs"]["token_logprobs"][0] is None


def test_echo_of_a_scored_prompt(server: LiveServer) -> None:
    parts = chunks(server, prompt="abc", echo=True, max_tokens=0, logprobs=0)
    assert [part["choices"][0]["text"] for part in parts] == ["abc"]
    assert parts[0]["choices"][0]["finish_reason"] == "length"


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


FIELDS = st.fixed_dictionaries(
    {
        "prompt": st.text("abc the€\n", min_size=1, max_size=8),
        "max_tokens": st.integers(0, 12),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "echo": st.booleans(),
        "return_token_ids": st.booleans(),
        "prompt_logprobs": st.none() | st.integers(0, 2),
        "stop": st.lists(st.text("abc the€", min_size=1, max_size=4), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
    },
).flatmap(
    lambda fields: st.sampled_from(
        [{**fields, "logprobs": 2}, {**fields, "logprobs": True, "top_logprobs": 1}, fields]
    )
)


@settings(max_examples=150)
@given(fields=FIELDS)
def test_streamed_answer_equals_its_plain_twin(server: LiveServer, fields: dict[str, Any]) -> None:
    plain = server.complete(**fields).json()
    parts = chunks(server, **fields, stream_options={"include_usage": True})
    assert parts[-1]["usage"] == plain["usage"]
    for choice in plain["choices"]:
        own = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert joined(c.get("token_ids", []) for c in own) == choice.get("token_ids", [])
        assert own[0].get("prompt_logprobs") == choice.get("prompt_logprobs")
        for key in choice["logprobs"] or ():
            if key != "refusal":
                assert joined(c["logprobs"][key] for c in own) == choice["logprobs"][key], key


def test_sixty_four_streams_at_once_through_the_openai_client(server: LiveServer) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        text = ""
        stream = await client.completions.create(
            model=MODEL,
            prompt=f"text number {i} ",
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            text += "".join(choice.text for choice in chunk.choices)
        return text

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*[ask(client, i) for i in range(64)])

    for i, text in enumerate(asyncio.run(crowd())):
        assert text == server.complete(prompt=f"text number {i} ", max_tokens=40).json()["choices"][0]["text"]


def test_openai_client_reads_answers_and_errors(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=3, logprobs=1, echo=True)
        assert answer.choices[0].text == "abcabc"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model=MODEL, prompt="abc", temperature=9)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="no/such", prompt="abc")
        assert MODEL in [model.id for model in client.models.list()]
        assert client.models.retrieve(MODEL).id == MODEL

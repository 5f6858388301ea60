"""Any request at all: its stream, put together again, is the answer that it gets without a stream.

    requests ──┬─▶ plain ───────────────▶ answer ──┐
               └─▶ stream ─▶ chunks ─▶ merged ─────┴─▶ equal: text, ids, log-probabilities, ends, usage

All requests of one example run at once, with both twins of each, so that neighbours, shared prefixes and the
order of arrival are different each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import TINY, Server
from waiting import PATIENCE_S

CROWD = 4
"""Requests of one example."""
VOCAB = 320
PIECES = ["e", " ", "th", "mill", "\n", "�", "��", "a", "ou", "水", "<|tool|>", '"', "}", "1"]
WORDS = ["The mill", " stands by the river", "sacks: 12", "Mühle", "水車", "🌾", "<|im_start|>", "\n\n", ""]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["oat", "rye"]}, "note": {"type": "string", "maxLength": 5}},
    "required": ["kind"],
    "additionalProperties": False,
}
FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "flour", "schema": SCHEMA}}},
    {"guided_json": SCHEMA},
    {"guided_regex": "[a-fé]{2,9}(水|🌾)?"},
    {"guided_choice": ["grind", "grinding", "水車"]},
    {"guided_grammar": 'start: "<" /[a-z ]{0,9}/ ">"'},
]
ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "content")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.lists(
    st.sampled_from(WORDS), max_size=6
).map("".join)
token_ids = st.integers(0, VOCAB - 1)
id_lists = st.lists(token_ids, min_size=1, max_size=40)
prompts = st.one_of(
    texts, id_lists, st.lists(texts, min_size=1, max_size=3), st.lists(id_lists, min_size=1, max_size=3)
)
penalties = st.floats(-2, 2, width=16)
stops = st.sampled_from(PIECES) | texts.filter(bool)
scores = st.one_of(
    st.just({}),
    st.builds(lambda k: {"logprobs": k}, st.integers(0, 5)),
    st.builds(lambda k: {"logprobs": True, "top_logprobs": k}, st.integers(0, 5)),
    st.just({"return_token_log_probs": True}),
)
formats = st.one_of(st.just({}), st.just({}), st.just({}), st.sampled_from(FORMATS))
predictions = st.builds(lambda text: {"type": "content", "content": text}, texts)
stream_options = st.none() | st.fixed_dictionaries(
    {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
)
fields = st.fixed_dictionaries(
    {"prompt": prompts, "seed": st.integers(-(2**63), 2**63 - 1), "max_tokens": st.integers(0, 24)},
    optional={
        "temperature": st.sampled_from([0, 0.0, 1e-6, 0.3, 1, 2]),
        "top_p": st.floats(0.05, 1),
        "top_k": st.integers(-1, 30).filter(bool),
        "min_p": st.floats(0, 1),
        "presence_penalty": penalties,
        "frequency_penalty": penalties,
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.dictionaries(token_ids.map(str), st.floats(-100, 100), max_size=3),
        "n": st.integers(1, 3),
        "stop": st.none() | stops | st.lists(stops, max_size=4),
        "stop_token_ids": st.lists(token_ids, max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "min_tokens": st.integers(0, 12),
        "ignore_eos": st.booleans(),
        "echo": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "add_special_tokens": st.booleans(),
        "truncate_prompt_tokens": st.none() | st.integers(1, 10),
        "prompt_logprobs": st.none() | st.integers(0, 3),
        "prediction": st.none() | predictions,
    },
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A legal request of any kind, and under `stream_options` what its streamed twin asks for besides."""
    request = {**draw(fields), **draw(scores), **draw(formats), "stream_options": draw(stream_options)}
    if "min_tokens" in request:
        request["min_tokens"] = min(request["min_tokens"], request["max_tokens"])
    return {"model": TINY, "return_token_ids": True, **request}


crowds = st.lists(requests(), min_size=CROWD, max_size=CROWD)


@dataclass(frozen=True)
class Client:
    """Asks one server for many things at once."""

    http: httpx.Client
    threads: ThreadPoolExecutor

    def plain(self, request: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json={**request, "stream_options": None})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def streamed(self, request: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json={**request, "stream": True})
        assert response.status_code == 200, response.text
        *chunks, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return merged([json.loads(chunk.removeprefix("data: ")) for chunk in chunks], request)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
        ThreadPoolExecutor(2 * CROWD) as threads,
    ):
        yield Client(http, threads)


def merged(chunks: list[dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """One answer from the chunks of a stream; checks the form of the stream on the way."""
    options = request["stream_options"] or {}
    with_usage = options.get("include_usage", False)
    usage = None
    if with_usage:
        last = chunks.pop()
        assert last["choices"] == []
        usage = last["usage"]
    choices: dict[int, dict[str, Any]] = {}
    heads = set()
    used = 0
    for chunk in chunks:
        heads.add((chunk["id"], chunk["object"], chunk["created"], chunk["model"]))
        (part,) = chunk["choices"]
        add_part(choices, part)
        if with_usage and options.get("continuous_usage_stats"):
            assert used <= chunk["usage"]["completion_tokens"] <= usage["completion_tokens"]
            used = chunk["usage"]["completion_tokens"]
        else:
            assert chunk.get("usage") is None
            assert ("usage" in chunk) == with_usage
    assert len(heads) == 1
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def add_part(choices: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """Append one chunk's choice to what came of it before."""
    known = choices.setdefault(part["index"], part)
    if known is part:
        return
    assert known["finish_reason"] is None, "a choice went on after its end"
    known["text"] += part["text"]
    known["token_ids"] += part["token_ids"]
    known["finish_reason"] = part["finish_reason"]
    assert "prompt_token_ids" not in part
    assert (known["logprobs"] is None) == (part["logprobs"] is None)
    for name in ARRAYS:
        if part["logprobs"] is not None and name in part["logprobs"]:
            known["logprobs"][name] += part["logprobs"][name]


def comparable(usage: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """A usage without what depends on the moment: what the cache held, what was drafted before an abort."""
    details = usage["completion_tokens_details"]
    if request.get("prediction") is None:
        assert details["accepted_prediction_tokens"] == details["rejected_prediction_tokens"] == 0
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


def check(client: Client, crowd: list[dict[str, Any]]) -> None:
    """Ask for every request twice, all at once, and compare."""
    streams = [client.threads.submit(client.streamed, request) for request in crowd]
    plains = [client.threads.submit(client.plain, request) for request in crowd]
    for request, stream, plain in zip(crowd, streams, plains, strict=True):
        answer, twin = stream.result(), plain.result()
        assert answer["choices"] == twin["choices"]
        assert all(choice["finish_reason"] in ("stop", "length") for choice in twin["choices"])
        if answer["usage"] is not None:
            assert comparable(answer["usage"], request) == comparable(twin["usage"], request)


any_crowd = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], print_blob=True
)


@settings(any_crowd, max_examples=152 // CROWD)
@given(crowd=crowds)
def test_a_stream_equals_its_plain_twin(client: Client, crowd: list[dict[str, Any]]) -> None:
    check(client, crowd)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(any_crowd, max_examples=10_000 // CROWD)
@given(crowd=crowds)
def test_ten_thousand_streams_equal_their_plain_twins(client: Client, crowd: list[dict[str, Any]]) -> None:
    check(client, crowd)

"""The response table: what every field of an answer holds, streamed or not. Named by the field."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from chat_live import CALL, TOOLS
from live_server import MODEL, LiveServer, events

FIELDS = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
CHOICE = {"index", "text", "logprobs", "finish_reason"}
REQUEST: dict[str, Any] = {"prompt": "abc", "max_tokens": 4, "temperature": 0}


def answer(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.complete(**{**REQUEST, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def chunks(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    *data, done = events(server.complete(**{**REQUEST, "stream": True, **fields}))
    assert done == "[DONE]"
    return [json.loads(event) for event in data]


def test_fields_are_all_there_and_no_others(server: LiveServer) -> None:
    whole = answer(server)
    assert set(whole) == FIELDS
    assert [set(choice) for choice in whole["choices"]] == [CHOICE]
    for chunk in chunks(server):
        assert set(chunk) == FIELDS - {"usage"}
        assert [set(choice) for choice in chunk["choices"]] == [CHOICE]


def test_id_is_the_servers_own(server: LiveServer) -> None:
    body = {**REQUEST, "inference_extra_headers": {"x-request-id": "mine-1"}}
    first, second = (server.client.post("/v1/completions", json=body) for _ in range(2))
    names = [response.json()["id"] for response in (first, second)]
    assert all(re.fullmatch(r"cmpl-[0-9a-zA-Z]{24,}", name) for name in names)
    assert names[0] != names[1]
    assert [response.headers["x-request-id"] for response in (first, second)] == ["mine-1"] * 2
    assert len({chunk["id"] for chunk in chunks(server)}) == 1


def test_object_says_which_kind_of_prompt_it_was(server: LiveServer, chat_server: LiveServer) -> None:
    assert answer(server)["object"] == "text_completion"
    assert {chunk["object"] for chunk in chunks(server)} == {"text_completion"}
    body = {"model": "chat/plain/hermes", "prompt": f"«{CALL}»", "tools": TOOLS, "max_tokens": 200}
    assert chat_server.client.post("/v1/completions", json=body).json()["object"] == "chat.completion"


def test_created_is_the_time(server: LiveServer) -> None:
    before = int(time.time())
    assert before <= answer(server)["created"] <= time.time()
    assert len({chunk["created"] for chunk in chunks(server)}) == 1


def test_model_is_the_name_that_was_asked_for(server: LiveServer) -> None:
    for name in (MODEL, "echo", f"{MODEL}/greedy"):
        assert answer(server, model=name)["model"] == name
        assert {chunk["model"] for chunk in chunks(server, model=name)} == {name}


def test_system_fingerprint_is_the_engines(server: LiveServer) -> None:
    assert answer(server)["system_fingerprint"] == "fake-1"
    assert answer(server, model=f"{MODEL}/greedy", seed=4, max_tokens=9)["system_fingerprint"] == "fake-1"
    assert {chunk["system_fingerprint"] for chunk in chunks(server)} == {"fake-1"}


def test_choices_have_their_indices(server: LiveServer) -> None:
    fields = {"prompt": ["abc", "xyz"], "n": 2, "temperature": 1, "seed": 0}
    whole = answer(server, **fields)["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in whole}) == 4
    assert [set(choice["text"]) <= set("<s>abc") for choice in whole] == [True, True, False, False]
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks(server, **fields):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in whole]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, "length"), ({"stop": "c"}, "stop"), ({"max_tokens": 0}, "length"), ({"max_tokens": 1}, "length")],
)
def test_finish_reason(server: LiveServer, fields: dict[str, Any], reason: str) -> None:
    assert answer(server, **fields)["choices"][0]["finish_reason"] == reason
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks(server, **fields)]
    assert reasons == [None] * (len(reasons) - 1) + [reason]


def test_finish_reason_at_the_models_end(start: Callable[..., LiveServer]) -> None:
    ending = start('models: {toy/echo: {source: "fake:eos_after=2"}}')
    assert answer(ending)["choices"][0]["finish_reason"] == "stop"


def test_finish_reason_of_calls(chat_server: LiveServer) -> None:
    body = {"model": "chat/plain/hermes", "prompt": f"«{CALL}»", "tools": TOOLS, "max_tokens": 200}
    (choice,) = chat_server.client.post("/v1/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_usage_counts_every_candidate(server: LiveServer) -> None:
    usage = answer(server, prompt=["abc", "xyz"], n=2, best_of=3)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (8, 24, 32)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert set(usage["completion_tokens_details"]) == {
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
        "reasoning_tokens",
        "audio_tokens",
    }


def test_usage_counts_through_the_stop(server: LiveServer) -> None:
    assert answer(server, stop="c", max_tokens=9)["usage"]["completion_tokens"] == 3


def test_usage_in_a_stream(server: LiveServer) -> None:
    whole = answer(server)["usage"]
    *parts, last = chunks(server, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], whole)
    assert all(part["usage"] is None for part in parts)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = chunks(server, stream_options=options)
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert (counts[-1], last["usage"]) == (4, whole)

"""`tools` on the completions routes: the prompt as a chat message, calls beside the text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from chat_live import CALL, TOOLS, WEATHER
from live_server import LiveServer, events

ARGUMENTS = {"city": "Paris"}


def post(server: LiveServer, prompt: Any, kind: str = "hermes", **fields: Any) -> httpx.Response:
    body = {"model": f"chat/plain/{kind}", "prompt": prompt, "temperature": 0, "max_tokens": 1500, **fields}
    return server.client.post("/v1/completions", json={"tools": TOOLS, **body})


def choice(server: LiveServer, prompt: str, **fields: Any) -> dict[str, Any]:
    response = post(server, prompt, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "chat.completion"
    (only,) = response.json()["choices"]
    return dict(only)


def called(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = answer["tool_calls"]
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def test_call_stands_beside_the_text(chat_server: LiveServer) -> None:
    answer = choice(chat_server, f"«Let me see. {CALL}»")
    assert called(answer) == [("get_weather", ARGUMENTS)]
    assert (answer["text"].strip(), answer["finish_reason"]) == ("Let me see.", "tool_calls")


def test_answer_without_a_call(chat_server: LiveServer) -> None:
    answer = choice(chat_server, "«It rains.»")
    assert (answer["text"], answer["finish_reason"]) == ("It rains.", "stop")
    assert "tool_calls" not in answer


def test_prompt_goes_through_the_template(chat_server: LiveServer) -> None:
    text = choice(
        chat_server, "Question «PROMPT»", kind="thinking", skip_special_tokens=False, tools=[WEATHER]
    )
    assert "Question" in text["text"]
    assert "get_weather" in text["text"]


def test_choices_of_several_prompts(chat_server: LiveServer) -> None:
    body = post(chat_server, [f"«{CALL}»", "«no call»"], n=2).json()
    assert [(row["index"], row["finish_reason"]) for row in body["choices"]] == [
        (0, "tool_calls"),
        (1, "tool_calls"),
        (2, "stop"),
        (3, "stop"),
    ]
    assert [row["text"] for row in body["choices"]][2:] == ["no call", "no call"]


def test_stream_tells_the_same(chat_server: LiveServer) -> None:
    response = post(chat_server, f"«Wait. {CALL}»", stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["completion_tokens"] > 0
    rows = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert {json.loads(chunk)["object"] for chunk in chunks} == {"chat.completion"}
    assert "".join(row["text"] for row in rows).strip() == "Wait."
    pieces = [piece for row in rows for piece in row.get("tool_calls", [])]
    assert pieces[0]["function"]["name"] == "get_weather"
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == ARGUMENTS
    assert [row["finish_reason"] for row in rows] == [None] * (len(rows) - 1) + ["tool_calls"]


def test_choice_of_tools(chat_server: LiveServer) -> None:
    answer = choice(chat_server, f"«{CALL}»", tool_choice="none")
    assert (answer["text"].strip(), answer["finish_reason"]) == (CALL, "stop")
    grammar = choice(chat_server, "«GRAMMAR»", tool_choice="required")
    assert "get_weather" in str(grammar)
    answer = choice(chat_server, f"«{CALL}{CALL}»", parallel_tool_calls=False)
    assert len(answer["tool_calls"]) == 1


def test_logprobs_ids_and_gateway(chat_server: LiveServer) -> None:
    answer = choice(chat_server, "«Hi»", logprobs=True, top_logprobs=1, return_token_ids=True)
    assert [row["token"] for row in answer["logprobs"]["content"]][:2] == ["H", "i"]
    assert len(answer["token_ids"]) == len(answer["logprobs"]["content"])
    assert answer["prompt_token_ids"]
    body = {"model": "chat/plain/hermes", "prompt": f"«{CALL}»", "tools": TOOLS, "max_tokens": 400}
    response = chat_server.client.post("/v4/beta/completions", json=body)
    assert called(response.json()["choices"][0]) == [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"logprobs": 2}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"kind": "toolless"}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"tools": None, "reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_does_not_go_with_tools(chat_server: LiveServer, fields: dict[str, Any], param: str) -> None:
    response = post(chat_server, **{"prompt": "a", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param

"""`response_format` and the `guided_` fields: what the engine is told, and what comes of its refusal."""

from __future__ import annotations

import json
from typing import Any

import pytest
from live_server import LiveServer, events
from waiting import eventually

from tokenmill.server.parse import parse_completion

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
WANTED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, 'json_schema:{"type":"object"}'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        f"json_schema:{json.dumps(SCHEMA, separators=(',', ':'))}",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "json_schema:{}"),
    ({"guided_json": {"type": "null"}}, 'json_schema:{"type":"null"}'),
    ({"guided_json": ' {"type": "null"} '}, 'json_schema:{"type":"null"}'),
    ({"guided_regex": "[a-z]+"}, "regex:[a-z]+"),
    ({"guided_choice": ["yes", 'n"o']}, 'choice:["yes","n\\"o"]'),
    ({"guided_grammar": 'root ::= "x"'}, 'grammar:root ::= "x"'),
]


@pytest.mark.parametrize(("fields", "expected"), WANTED)
def test_engine_gets_the_grammar(server: LiveServer, fields: dict[str, Any], expected: str) -> None:
    (choice,) = server.complete(prompt="a", max_tokens=500, **fields).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


def test_text_is_no_grammar(server: LiveServer) -> None:
    body = server.complete(prompt="ab", max_tokens=2, response_format={"type": "text"}).json()
    assert body["choices"][0]["text"] == "ab"
    both = {"response_format": {"type": "text"}, "guided_choice": ["x"]}
    assert server.complete(prompt="ab", max_tokens=50, **both).json()["choices"][0]["text"] == 'choice:["x"]'


REFUSED: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "REFUSE"}}},
    "guided_json": {"title": "REFUSE"},
    "guided_regex": "REFUSE",
    "guided_choice": ["REFUSE"],
    "guided_grammar": "REFUSE",
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_grammar_that_can_not_be_compiled_is_named(server: LiveServer, field: str, stream: bool) -> None:
    response = server.complete(prompt="a", stream=stream, **{field: REFUSED[field]})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": f"{field}: it can't be compiled",
        "type": "invalid_request_error",
        "param": field,
        "code": None,
    }
    eventually(server.is_idle)


def test_refusal_after_the_stream_has_begun_is_an_event(server: LiveServer) -> None:
    response = server.complete(prompt="a", max_tokens=9, stream=True, guided_regex="DEADEND")
    assert response.status_code == 200
    *chunks, last = [json.loads(event) for event in events(response)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "rege"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    error = last["error"]
    assert (error["status_code"], error["param"], error["type"]) == (
        400,
        "guided_regex",
        "invalid_request_error",
    )
    assert "nothing can follow" in error["message"]
    whole = server.complete(prompt="a", max_tokens=9, guided_regex="DEADEND")
    assert (whole.status_code, whole.json()["error"]["param"]) == (400, "guided_regex")


def test_schema_text_that_is_nested_without_end() -> None:
    deep = '{"a":' * 20_000 + "1" + "}" * 20_000
    with pytest.raises(Exception, match="nested too deeply"):
        parse_completion(json.dumps({"prompt": "a", "guided_json": deep}).encode())

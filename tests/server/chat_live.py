"""A server with chat models of several kinds over `chat_engine.py`, one template each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from live_server import LiveServer, events

CHAT_ENGINE = Path(__file__).parent / "chat_engine.py"
TEMPLATES = Path(__file__).parent / "templates"
CONFIG = f"""
version: 1
models:
  chat/plain:
    source: "chat:"
    max_context: 4096
    deployments:
      hermes: {{chat_template: {TEMPLATES}/hermes.jinja}}
      mistral: {{chat_template: {TEMPLATES}/mistral.jinja}}
      llama: {{tool_parser: llama3}}
      deepseek: {{tool_parser: deepseek}}
      thinking: {{chat_template: {TEMPLATES}/thinking.jinja}}
      no_system: {{chat_template: {TEMPLATES}/no_system.jinja}}
      endless: {{chat_template: {TEMPLATES}/endless.jinja}}
      toolless: {{tools: false}}
      short: {{sampling: {{max_tokens: 3}}}}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def user(content: str) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]


def says(text: str) -> list[dict[str, Any]]:
    """A conversation after which the model says this text."""
    return user(f"«{text}»")


def post(server: LiveServer, kind: str = "", **fields: Any) -> httpx.Response:
    """`POST /v1/chat/completions` to the deployment of this kind."""
    model = f"chat/plain/{kind}" if kind else "chat/plain"
    return server.client.post("/v1/chat/completions", json={"model": model, "temperature": 0, **fields})


def chat(server: LiveServer, kind: str = "", **fields: Any) -> dict[str, Any]:
    """The body of an answer."""
    response = post(server, kind, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def choice(server: LiveServer, kind: str = "", **fields: Any) -> dict[str, Any]:
    """The only choice of an answer."""
    (only,) = chat(server, kind, **fields)["choices"]
    return dict(only)


def message(server: LiveServer, kind: str = "", **fields: Any) -> dict[str, Any]:
    """The message of an answer's only choice."""
    return dict(choice(server, kind, **fields)["message"])


def prompt(server: LiveServer, kind: str = "", **fields: Any) -> str:
    """The rendered prompt of a conversation whose last message says «PROMPT»."""
    return str(message(server, kind, skip_special_tokens=False, **fields)["content"])


def refused(
    server: LiveServer, param: str | None, kind: str = "", code: str | None = None, **fields: Any
) -> str:
    """The message of a request's refusal."""
    response = post(server, kind, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    return str(error["message"])


def chunks(server: LiveServer, kind: str = "", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream."""
    response = post(server, kind, stream=True, **fields)
    assert response.status_code == 200, response.text
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(event) for event in data]


def assembled(parts: Iterable[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice put together from its chunks, as a client does it."""
    whole: dict[str, Any] = {"role": None, "content": None, "refusal": None, "finish_reason": None}
    calls: list[dict[str, Any]] = []
    for part in parts:
        for own in part["choices"]:
            if own["index"] != index:
                continue
            assert whole["finish_reason"] is None
            delta = own["delta"]
            whole["role"] = delta.get("role", whole["role"])
            for key in ("content", "reasoning_content"):
                if delta.get(key):
                    whole[key] = (whole.get(key) or "") + delta[key]
            for piece in delta.get("tool_calls", []):
                if piece["index"] == len(calls):
                    calls.append({key: value for key, value in piece.items() if key != "index"})
                else:
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            whole["finish_reason"] = own["finish_reason"]
    if calls:
        whole["tool_calls"] = calls
    return whole

"""Chats through the public openai client and the real engine: plain, streamed, tools, structured output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from server_process import SMOLLM2, TINY, Server

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
LIGHT: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "set_light": LIGHT}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
HELLO: Any = [{"role": "user", "content": "Hi"}]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
FRANCE: Any = [SYSTEM, {"role": "user", "content": "What is the capital of France?"}]
WEATHER_IN_PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240) as opened:
        yield opened


def check_calls(calls: Any) -> None:
    """Every call names a function, with arguments under its schema."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(6))
def test_required_calls_of_random_weights_are_valid(client: openai.OpenAI, seed: int) -> None:
    fields: Any = {"model": TINY, "messages": HELLO, "tools": TOOLS[:1], "seed": seed}
    fields |= {"tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat.completions.create(**fields)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls or ()) == 1
    check_calls(choice.message.tool_calls)
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [call.function.arguments for call in streamed.message.tool_calls or ()] == [
        call.function.arguments for call in choice.message.tool_calls or ()
    ]


def test_named_function_is_called(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "set_light"}}
    answer = client.chat.completions.create(
        model=TINY, messages=HELLO, tools=TOOLS, tool_choice=named, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "set_light"
    check_calls([call])


def test_several_calls_in_one_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TINY, messages=HELLO, tools=TOOLS[1:], tool_choice="required", seed=3, n=4
    )
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        # Random weights may go on until the context ends in the middle of a call.
        check_calls(calls if choice.finish_reason == "tool_calls" else calls[:-1])
    assert any(len(choice.message.tool_calls or ()) > 1 for choice in answer.choices)


class Person(pydantic.BaseModel):
    """What an answer is parsed into."""

    kind: Literal["poet", "miller"]
    born: int = pydantic.Field(ge=1700, le=1999)
    alive: bool


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=TINY, messages=HELLO, response_format=Person, seed=2, max_tokens=200
    )
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person)


class SetLight(pydantic.BaseModel):
    """Switch the light."""

    on: bool


class Paint(pydantic.BaseModel):
    """Paint a wall."""

    colour: Literal["red", "blue"]


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("kind", [SetLight, Paint])
def test_calls_are_parsed(client: openai.OpenAI, kind: type[pydantic.BaseModel], required: bool) -> None:
    fields: dict[str, Any] = {
        "model": TINY,
        "messages": HELLO,
        "tools": [openai.pydantic_function_tool(kind)],
        "tool_choice": "required" if required else {"type": "function", "function": {"name": kind.__name__}},
        "parallel_tool_calls": False,
        "seed": 4,
        "max_tokens": 120,
    }
    (call,) = client.chat.completions.parse(**fields).choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, kind)
    with client.chat.completions.stream(**fields) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


@pytest.mark.parametrize("seed", range(4))
def test_functions_get_no_arguments_that_they_do_not_list(client: openai.OpenAI, seed: int) -> None:
    """Frameworks send schemas that leave further keys open; random weights would never stop adding some."""
    loose = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tools: Any = [{"type": "function", "function": {"name": "set_light", "parameters": loose}}]
    answer = client.chat.completions.create(
        model=TINY,
        messages=HELLO,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "set_light"}},
        seed=seed,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert list(json.loads(call.function.arguments)) == ["on"]


@pytest.mark.parametrize("seed", range(3))
def test_json_objects_are_objects(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        model=TINY,
        messages=HELLO,
        response_format={"type": "json_object"},
        seed=seed,
        max_tokens=400,
    )
    (choice,) = answer.choices
    content = choice.message.content or ""
    assert content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


def test_schema_that_cant_be_compiled_is_a_bad_request(client: openai.OpenAI) -> None:
    impossible = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": "("}},
        "required": ["a"],
    }
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": impossible}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TINY, messages=HELLO, tools=tools, tool_choice="required")
    assert caught.value.param == "tools"


def test_stream_equals_its_plain_twin(client: openai.OpenAI) -> None:
    fields: Any = {"model": TINY, "messages": HELLO, "seed": 5, "max_tokens": 60, "n": 2}
    whole = client.chat.completions.create(**fields, logprobs=True)
    texts = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    reasons: dict[int, str | None] = {}
    for chunk in client.chat.completions.create(**fields, logprobs=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                tokens[choice.index] += [token.token for token in choice.logprobs.content or ()]
            reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert choice.logprobs is not None
        assert tokens[choice.index] == [token.token for token in choice.logprobs.content or ()]
        assert reasons[choice.index] == choice.finish_reason


@pytest.mark.smollm2
def test_smollm2_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SMOLLM2, messages=FRANCE, temperature=0, max_tokens=40)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=SMOLLM2, messages=FRANCE, temperature=0, max_tokens=40, stream=True
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content
    )


@pytest.mark.smollm2
def test_smollm2_continues_what_was_begun(client: openai.OpenAI) -> None:
    messages: Any = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.chat.completions.create(
        model=SMOLLM2,
        messages=messages,
        temperature=0,
        max_tokens=5,
        extra_body={"continue_final_message": True},
    )
    assert (answer.choices[0].message.content or "").startswith(" Paris")


@pytest.mark.smollm2
def test_smollm2_calls_the_function_that_it_must(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SMOLLM2,
        messages=WEATHER_IN_PARIS,
        tools=TOOLS[:1],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] == "Paris"

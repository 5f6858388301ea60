"""Tools over a real socket: in the prompt, in the answer, in streams, under grammars, and refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from chat_live import (
    CALL,
    NOW,
    TOOLS,
    WEATHER,
    assembled,
    chat,
    choice,
    chunks,
    message,
    prompt,
    refused,
    says,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import LiveServer

ARGUMENTS = '{"city": "Paris"}'
NAMED = {"type": "function", "function": {"name": "now"}}
WRITTEN = {
    "hermes": CALL,
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
    "llama": f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "": f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}',
}


def functions(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of an answer's calls."""
    calls = answer.get("tool_calls", [])
    assert all(set(call) == {"id", "type", "function"} and call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize("kind", WRITTEN)
def test_calls_in_every_form(chat_server: LiveServer, kind: str) -> None:
    fields: dict[str, Any] = {"messages": says(WRITTEN[kind]), "tools": TOOLS}
    own = choice(chat_server, kind, **fields)
    assert own["finish_reason"] == "tool_calls"
    assert own["message"]["content"] is None
    assert functions(own["message"]) == [("get_weather", ARGUMENTS)]
    assert own["message"]["tool_calls"][0]["id"].startswith("call_")
    streamed = assembled(chunks(chat_server, kind, **fields))
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] is None
    assert functions(streamed) == [("get_weather", ARGUMENTS)]


def test_stream_of_a_call_has_openais_deltas(chat_server: LiveServer) -> None:
    parts = chunks(chat_server, "hermes", messages=says(f"Hm. {CALL}"), tools=TOOLS)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    content = "".join(delta.get("content", "") for delta in deltas)
    assert content == "Hm."
    first, *rest = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert set(first) == {"index", "id", "type", "function"}
    assert first["function"]["name"] == "get_weather"
    assert all(set(piece) == {"index", "function"} for piece in rest)
    assert len(rest) > 3
    assert parts[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


def test_text_without_a_call_is_content(chat_server: LiveServer) -> None:
    own = choice(chat_server, "hermes", messages=says("It <tool_ rains.\n"), tools=TOOLS)
    assert own["finish_reason"] == "stop"
    assert own["message"] == {"role": "assistant", "content": "It <tool_ rains.\n", "refusal": None}


def test_call_that_is_cut_off_ends_with_length(chat_server: LiveServer) -> None:
    own = choice(chat_server, "hermes", messages=says(CALL), tools=TOOLS, max_tokens=45)
    assert own["finish_reason"] == "length"
    ((name, arguments),) = functions(own["message"])
    assert name == "get_weather"
    assert ARGUMENTS.startswith(arguments)


@pytest.mark.parametrize("kind", ["hermes", "mistral", "llama", "deepseek", ""])
@pytest.mark.parametrize("demanded", [True, False])
def test_wherever_a_call_is_cut_off_its_markup_is_no_content(
    chat_server: LiveServer, kind: str, demanded: bool
) -> None:
    tool_choice = "required" if demanded else "auto"
    fields: dict[str, Any] = {"messages": says(WRITTEN[kind]), "tools": TOOLS, "tool_choice": tool_choice}
    for length in range(1, len(WRITTEN[kind]), 8):
        own = choice(chat_server, kind, **fields, max_tokens=length)
        streamed = assembled(chunks(chat_server, kind, **fields, max_tokens=length))
        calls, content = functions(own["message"]), own["message"]["content"] or ""
        assert (functions(streamed), streamed["content"] or "") == (calls, content)
        assert all(name == "get_weather" and ARGUMENTS.startswith(given) for name, given in calls)
        # Text that ends where a marker or a key may begin is text, unless nothing but calls may come. A token
        # of the toy is a byte: half a character is none of a marker.
        assert len(content) < 25
        assert not (content and demanded) or content.endswith("\ufffd")
        if own["finish_reason"] != "length":
            break


def test_choices_have_their_own_calls(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": says(f"no|||{CALL}"), "tools": TOOLS, "n": 2}
    plain, called = chat(chat_server, "hermes", **fields)["choices"]
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", "no")
    assert called["finish_reason"] == "tool_calls"
    parts = chunks(chat_server, "hermes", **fields)
    assert assembled(parts, 0)["content"] == "no"
    assert functions(assembled(parts, 1)) == [("get_weather", ARGUMENTS)]


def test_parallel_calls(chat_server: LiveServer) -> None:
    two = f'{CALL}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'
    both = [("get_weather", ARGUMENTS), ("now", "{}")]
    fields: dict[str, Any] = {"messages": says(two), "tools": TOOLS}
    answer = message(chat_server, "hermes", **fields)
    assert functions(answer) == both
    assert len({call["id"] for call in answer["tool_calls"]}) == 2
    body = chat(chat_server, "hermes", parallel_tool_calls=False, **fields)
    assert functions(body["choices"][0]["message"]) == both[:1]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    # It stopped behind the first call.
    assert body["usage"]["completion_tokens"] < len(two) - 20
    streamed = assembled(chunks(chat_server, "hermes", parallel_tool_calls=False, **fields))
    assert functions(streamed) == both[:1]


def test_tools_stand_where_the_template_puts_them(chat_server: LiveServer) -> None:
    text = prompt(chat_server, "hermes", messages=user("«PROMPT»"), tools=TOOLS)
    assert f"<tools>\n{json.dumps(WEATHER)}\n" in text
    assert text.count("get_weather") == 1


def test_tools_in_a_system_message_where_the_template_knows_none(chat_server: LiveServer) -> None:
    text = prompt(chat_server, messages=user("«PROMPT»"), tools=TOOLS)
    assert text.startswith("<s>[system]You can call these functions")
    assert json.dumps(WEATHER["function"]) in text
    messages = [{"role": "system", "content": "Be brief."}, *user("«PROMPT»")]
    assert prompt(chat_server, messages=messages, tools=TOOLS).startswith(
        "<s>[system]Be brief.\n\nYou can call"
    )
    text = prompt(chat_server, "no_system", messages=user("«PROMPT»"), tools=TOOLS)
    assert text.startswith("[user]You can call these functions")
    assert "several" not in prompt(
        chat_server, messages=user("«PROMPT»"), tools=TOOLS, parallel_tool_calls=False
    )


def conversation(arguments: str = ARGUMENTS) -> list[dict[str, Any]]:
    """A call, its result, and the question for the prompt."""
    function = {"name": "get_weather", "arguments": arguments}
    call = {"id": "call_123456789012345678901234", "type": "function", "function": function}
    return [
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "Rain."},
        *user("«PROMPT»"),
    ]


def test_earlier_calls_in_the_templates_form(chat_server: LiveServer) -> None:
    # What the model says is the prompt, so the call in it is read as one again.
    answer = message(chat_server, "hermes", messages=conversation(), tools=TOOLS)
    assert functions(answer) == [("get_weather", ARGUMENTS)]
    assert "<tool_response>Rain.</tool_response>" in answer["content"]


def test_ids_fit_templates_that_count_their_characters(chat_server: LiveServer) -> None:
    text = prompt(chat_server, "mistral", messages=conversation(), tools=TOOLS)
    identifier = text.split("[TOOL_RESULTS]")[1].split(" ")[0]
    assert len(identifier) == 9
    assert identifier.isalnum()


def test_earlier_calls_as_text_where_the_template_knows_none(chat_server: LiveServer) -> None:
    text = prompt(chat_server, messages=conversation(), tools=TOOLS)
    assert '[assistant]{"name": "get_weather", "arguments": {"city": "Paris"}}\n' in text
    assert "[user]Result of get_weather:\nRain.\n" in text


def test_earlier_calls_must_have_arguments_that_a_template_can_read(chat_server: LiveServer) -> None:
    for arguments in ("{", "[1]", "5"):
        given = refused(chat_server, "messages", "hermes", messages=conversation(arguments), tools=TOOLS)
        assert "arguments" in given


def test_values_in_tags_have_the_types_of_the_schema(chat_server: LiveServer) -> None:
    properties = {"zip": {"type": "string"}, "days": {"type": "integer"}}
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": properties}},
    }
    values = "<parameter=zip>\n01069\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    written = f"<tool_call>\n<function=f>\n{values}</function>\n</tool_call>"
    answer = message(chat_server, "hermes", messages=says(written), tools=[tool])
    assert functions(answer) == [("f", '{"zip": "01069", "days": 3}')]


def test_none_offers_no_tools(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "none"}
    assert "get_weather" not in prompt(chat_server, "hermes", messages=user("«PROMPT»"), **fields)
    own = choice(chat_server, "hermes", messages=says(CALL), **fields)
    assert (own["message"]["content"], own["finish_reason"]) == (CALL, "stop")


def test_named_function_is_the_only_one(chat_server: LiveServer) -> None:
    grammar = message(chat_server, "hermes", messages=says("GRAMMAR"), tools=TOOLS, tool_choice=NAMED)[
        "content"
    ]
    assert '\\"name\\": \\"now\\"' in grammar
    assert "get_weather" not in grammar
    assert "call_1" not in grammar


def test_required_is_enforced_by_a_grammar(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": says("GRAMMAR"), "tools": TOOLS}
    grammar = message(chat_server, "hermes", tool_choice="required", **fields)["content"]
    assert grammar.startswith("start: calls\n")
    assert "(call_0 | call_1)" in grammar
    assert '"enum": ["Paris", "Rome"]' in grammar
    assert message(chat_server, "hermes", tool_choice="auto", **fields)["content"] == "none"
    alone = message(chat_server, "hermes", tool_choice="required", parallel_tool_calls=False, **fields)
    assert ")*" not in alone["content"]


def test_format_of_the_answer_beside_calls(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": says("GRAMMAR"), "tools": TOOLS}
    fields["response_format"] = {"type": "json_object"}
    grammar = message(chat_server, "hermes", **fields)["content"]
    assert grammar.startswith("start: (answer | calls)\n")
    assert "answer" not in message(chat_server, "hermes", tool_choice="required", **fields)["content"]
    assert "calls" not in message(chat_server, "hermes", tool_choice="none", **fields)["content"]
    del fields["response_format"]
    refused(chat_server, "tool_choice", "hermes", guided_grammar='start: "a"', **fields)


def test_strict_function_is_enforced_behind_the_marker(chat_server: LiveServer) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    grammar = message(chat_server, "hermes", messages=says("GRAMMAR"), tools=[strict, NOW])["content"]
    assert grammar.startswith("start: TEXT | ")
    assert '"enum": ["Paris", "Rome"]' in grammar
    loose = message(chat_server, "hermes", messages=says("GRAMMAR"), tools=TOOLS)["content"]
    assert loose == "none"


SCHEMAS: list[dict[str, Any]] = [
    {"type": "array"},
    {"type": "objekt"},
    {"properties": []},
    {"properties": {"a": 5}},
    {"properties": {"a": {"type": 5}}},
    {"properties": {"a": {"type": ["string", "thing"]}}},
    {"required": "a"},
    {"required": [1]},
    {"properties": {"a": {"enum": []}}},
    {"properties": {"a": {"anyOf": {}}}},
    {"properties": {"a": {"items": 3}}},
    {"$defs": {"a": 1}},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_is_no_schema_is_refused(chat_server: LiveServer, schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert "tools.0.function.parameters" in refused(chat_server, "tools", messages=user("a"), tools=[tool])


def test_schema_that_is_too_deep_is_refused(chat_server: LiveServer) -> None:
    schema: dict[str, Any] = {}
    for _ in range(150):
        schema = {"properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert "nested" in refused(chat_server, "tools", messages=user("a"), tools=[tool])


BAD: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": {}}),
    ("tools", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "a" * 65}}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "a", "parameters": "x"}}]}),
    ("tools", {"tools": [NOW, NOW]}),
    ("tools", {"tools": [{**NOW, "function": {"name": f"f{i}"}} for i in range(129)]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tool_choice": NAMED}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "sometimes"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "later"}}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function"}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": 5}),
    ("parallel_tool_calls", {"tools": TOOLS, "parallel_tool_calls": "no"}),
    ("tool_choice", {"tools": TOOLS, "response_format": {"type": "json_object"}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD)
def test_wrong_tools_are_refused(chat_server: LiveServer, param: str, fields: dict[str, Any]) -> None:
    refused(chat_server, param, messages=user("a"), **fields)


def test_wrong_parts_of_tools_are_named(chat_server: LiveServer) -> None:
    tool: dict[str, Any] = {"type": "function"}
    for code, rest in (
        ("missing_parameter", {}),
        ("missing_parameter", {"function": {}}),
    ):
        given = refused(chat_server, "tools", code=code, messages=user("a"), tools=[{**tool, **rest}])
        assert given.startswith("tools.0.function")
    tool = {"type": "function", "function": {"name": "a", "extra": 1}}
    name = "tools.0.function.extra"
    assert name in refused(chat_server, name, code="unknown_parameter", messages=user("a"), tools=[tool])


def test_what_is_accepted_without_tools(chat_server: LiveServer) -> None:
    for fields in (
        {"tools": []},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": True},
    ):
        assert message(chat_server, messages=says("a"), **fields)["content"] == "a"
    cached = {**NOW, "cache_control": {"type": "ephemeral"}}
    assert message(chat_server, messages=says("a"), tools=[cached])["content"] == "a"


def test_entry_without_tools(chat_server: LiveServer) -> None:
    assert "takes none" in refused(chat_server, "tools", "toolless", messages=user("a"), tools=TOOLS)
    assert (
        message(chat_server, "toolless", messages=says("a"), tools=TOOLS, tool_choice="none")["content"]
        == "a"
    )


def test_openai_client_calls_tools(chat_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
        fields: Any = {"model": "chat/plain/hermes", "messages": says(CALL), "tools": TOOLS}
        answer = client.chat.completions.create(**fields)
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        # An answer goes back into the conversation as it came.
        result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
        fields["messages"] = [*user("Weather?"), answer.choices[0].message, result, *says("It rains.")]
        assert client.chat.completions.create(**fields).choices[0].message.content == "It rains."
        with client.chat.completions.stream(
            model="chat/plain/hermes", messages=says(CALL), tools=TOOLS
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "get_weather"
        assert final.choices[0].finish_reason == "tool_calls"


PARTS = st.sampled_from(
    [*WRITTEN.values(), "<think>", "</think>", "text", " ", "\n", "{", "}", "[", "`", "<", "é"]
)


@settings(max_examples=100)
@given(
    st.lists(PARTS, max_size=4), st.sampled_from([*WRITTEN, "thinking"]), st.booleans(), st.integers(1, 200)
)
def test_streamed_answer_equals_its_plain_twin(
    chat_server: LiveServer, parts: list[str], kind: str, parallel: bool, length: int
) -> None:
    fields: dict[str, Any] = {
        "messages": says("".join(parts)),
        "tools": TOOLS,
        "parallel_tool_calls": parallel,
        "max_tokens": length,
    }
    plain = choice(chat_server, kind, **fields)
    streamed = assembled(chunks(chat_server, kind, **fields))
    whole = plain["message"]
    assert functions(streamed) == functions(whole)
    assert (streamed["content"] or "") == (whole["content"] or "")
    assert streamed.get("reasoning_content") == whole.get("reasoning_content")
    assert streamed["finish_reason"] == plain["finish_reason"]

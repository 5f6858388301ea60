"""Chats over a real socket, answered by the scripted engine: shapes, prompts, streams, thoughts, refusals."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from chat_live import (
    assembled,
    chat,
    choice,
    chunks,
    message,
    post,
    prompt,
    refused,
    says,
    user,
)
from live_server import LiveServer


def test_answer_has_openais_shape(chat_server: LiveServer) -> None:
    body = chat(chat_server, messages=says("Hello."))
    assert body["id"].startswith("chatcmpl-")
    assert len(body["id"]) >= 9 + 24
    assert isinstance(body["created"], int)
    usage = body["usage"]
    del body["id"], body["created"], body["usage"]
    assert body == {
        "object": "chat.completion",
        "model": "chat/plain",
        "system_fingerprint": "fake-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    assert usage["completion_tokens"] == len("Hello.") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_chunks_have_openais_shape(chat_server: LiveServer) -> None:
    parts = chunks(chat_server, messages=says("Hello."), stream_options={"include_usage": True})
    *parts, last = parts
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 7
    first, *middle, end = [part["choices"][0] for part in parts]
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert end == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(set(own["delta"]) == {"content"} and own["finish_reason"] is None for own in middle)
    assert "".join(own["delta"]["content"] for own in middle) == "Hello."


def test_usage_only_when_asked_for(chat_server: LiveServer) -> None:
    assert all("usage" not in part for part in chunks(chat_server, messages=says("a")))
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        part["usage"]["completion_tokens"]
        for part in chunks(chat_server, messages=says("abc"), stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_template_writes_the_prompt(chat_server: LiveServer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "«PROMPT»", "name": "ann"},
    ]
    text = prompt(chat_server, messages=messages)
    assert text == "<s>[system]Be brief.\n[user]One\ntwo\n[assistant]Three.\n[user]«PROMPT»\n[assistant]"
    assert prompt(chat_server, messages=user("«PROMPT»"), add_generation_prompt=False) == (
        "<s>[user]«PROMPT»\n"
    )


def test_bos_is_never_added_twice(chat_server: LiveServer) -> None:
    for adds in (True, False):
        text = prompt(chat_server, messages=user("«PROMPT»"), add_special_tokens=adds)
        assert text.count("<s>") == 1
    own = "<|im_start|>user\n«PROMPT»<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(chat_server, "hermes", messages=user("«PROMPT»")) == own
    assert prompt(chat_server, "hermes", messages=user("«PROMPT»"), add_special_tokens=True) == "<s>" + own


def test_developer_is_the_system_where_the_template_has_no_such_role(chat_server: LiveServer) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *user("«PROMPT»")]
    assert prompt(chat_server, "hermes", messages=messages).startswith("<|im_start|>system\nBe brief.")


def test_assistants_message_is_continued(chat_server: LiveServer) -> None:
    messages = [*user("«PROMPT»"), {"role": "assistant", "content": " The answer "}]
    for flags in (
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        text = prompt(chat_server, messages=messages, **flags)
        assert text == "<s>[user]«PROMPT»\n[assistant] The answer "
    followed = prompt(chat_server, messages=messages)
    assert followed == "<s>[user]«PROMPT»\n[assistant] The answer \n[assistant]"


def test_continuation_is_refused_where_it_makes_no_sense(chat_server: LiveServer) -> None:
    assistant = {"role": "assistant", "content": "x"}
    flags: dict[str, Any] = {"continue_final_message": True}
    refused(chat_server, "continue_final_message", messages=user("a"), **flags)
    refused(
        chat_server,
        "add_generation_prompt",
        messages=[*user("a"), assistant],
        add_generation_prompt=True,
        **flags,
    )


def test_variables_reach_the_template(chat_server: LiveServer) -> None:
    text = prompt(chat_server, "thinking", messages=user("«PROMPT»"), reasoning_effort="high")
    assert text.endswith("effort high")
    text = prompt(
        chat_server, "thinking", messages=user("«PROMPT»"), chat_template_kwargs={"reasoning_effort": "x"}
    )
    assert text.endswith("effort x")


@pytest.mark.parametrize(
    "variables",
    [
        {"messages": []},
        {"tools": 1},
        {"bos_token": "x"},
        {"raise_exception": 1},
        {"self": 1},
        {"_x": 1},
        {"a b": 1},
        {"x": [1]},
        {"x": {}},
        {f"x{i}": 1 for i in range(17)},
        "x",
    ],
)
def test_variables_that_the_renderer_uses_are_refused(chat_server: LiveServer, variables: object) -> None:
    refused(chat_server, "chat_template_kwargs", messages=user("a"), chat_template_kwargs=variables)


def test_templates_refusal_is_the_message(chat_server: LiveServer) -> None:
    messages = [*user("a"), {"role": "system", "content": "b"}]
    given = refused(chat_server, "messages", "hermes", messages=messages)
    assert given == "System message must be at the beginning."


def test_endless_template_is_stopped(chat_server: LiveServer) -> None:
    assert "steps" in refused(chat_server, "messages", "endless", messages=user("a"))
    assert message(chat_server, messages=says("alive"))["content"] == "alive"


def test_model_without_a_template(server: LiveServer) -> None:
    response = server.client.post("/v1/chat/completions", json={"messages": user("a")})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_answer_takes_what_is_left_of_the_context(chat_server: LiveServer) -> None:
    long = "x" * 500
    assert message(chat_server, messages=says(long))["content"] == long
    assert choice(chat_server, "short", messages=says(long))["finish_reason"] == "length"
    assert message(chat_server, "short", messages=says(long), max_completion_tokens=5)["content"] == "xxxxx"
    assert message(chat_server, messages=says(long), max_tokens=5)["content"] == "xxxxx"
    code = "context_length_exceeded"
    refused(
        chat_server,
        "max_completion_tokens",
        code=None,
        messages=says("a"),
        max_tokens=5,
        max_completion_tokens=6,
    )
    refused(chat_server, "max_tokens", code=code, messages=says("a"), max_tokens=5000)
    refused(chat_server, "messages", code=code, messages=user("x" * 5000))
    refused(chat_server, "messages", code=code, messages=user("x" * 100_000))


def test_choices_and_their_streams(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": says("one|||two|||three"), "n": 3}
    whole = chat(chat_server, **fields)["choices"]
    assert [own["message"]["content"] for own in whole] == ["one", "two", "three"]
    parts = chunks(chat_server, **fields)
    assert [assembled(parts, index)["content"] for index in range(3)] == ["one", "two", "three"]


def test_best_of_returns_the_likeliest(chat_server: LiveServer) -> None:
    body = chat(chat_server, messages=says("aaaa|||zzzz|||mmmm"), best_of=3)
    (own,) = body["choices"]
    assert own["index"] == 0
    assert body["usage"]["completion_tokens"] == 15


def test_stop_cuts_the_content(chat_server: LiveServer) -> None:
    own = choice(chat_server, messages=says("one, two, three"), stop=", t")
    assert (own["message"]["content"], own["finish_reason"]) == ("one", "stop")
    assert assembled(chunks(chat_server, messages=says("one, two"), stop=[", t"]))["content"] == "one"


def test_logprobs_have_the_chat_shape_only(chat_server: LiveServer) -> None:
    logprobs = choice(chat_server, messages=says("ab"), logprobs=True, top_logprobs=2)["logprobs"]
    assert set(logprobs) == {"content", "refusal"}
    assert [token["token"] for token in logprobs["content"]] == ["a", "b", "</s>"]
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs["content"])
    parts = chunks(chat_server, messages=says("ab"), logprobs=True, top_logprobs=2)
    streamed = [
        token
        for part in parts
        for own in part["choices"]
        for token in (own["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == logprobs["content"]
    refused(chat_server, "logprobs", messages=says("a"), logprobs=2)
    refused(chat_server, "top_logprobs", messages=says("a"), top_logprobs=2)
    refused(chat_server, "top_logprobs", messages=says("a"), logprobs=True, top_logprobs=21)


def test_token_ids_when_asked_for(chat_server: LiveServer) -> None:
    body = chat(chat_server, messages=says("ab"), return_token_ids=True)
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    ids = body["choices"][0]["token_ids"]
    assert len(ids) == 3
    first, *rest = chunks(chat_server, messages=says("ab"), return_token_ids=True)
    assert first["prompt_token_ids"] == body["prompt_token_ids"]
    assert [token for part in rest for token in part["choices"][0]["token_ids"]] == ids


def test_prompts_log_probabilities(chat_server: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": says("ab"), "prompt_logprobs": 2}
    body = chat(chat_server, **fields)
    first, *scored = body["prompt_logprobs"]
    assert first is None
    assert len(scored) == body["usage"]["prompt_tokens"] - 1
    assert all(len(row) in (2, 3) for row in scored)
    begin, *rest = chunks(chat_server, **fields)
    assert begin["prompt_logprobs"] == body["prompt_logprobs"]
    assert all("prompt_logprobs" not in part for part in rest)


def test_thoughts_are_kept_apart(chat_server: LiveServer) -> None:
    body = chat(chat_server, "thinking", messages=says("<think>\nHm.\n</think>\n\nYes."))
    answer = body["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("Hm.", "Yes.")
    thoughts = len("\nHm.\n") + 2
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == thoughts
    whole = assembled(chunks(chat_server, "thinking", messages=says("<think>\nHm.\n</think>\n\nYes.")))
    assert (whole["reasoning_content"], whole["content"]) == ("Hm.", "Yes.")


def test_thoughts_that_the_prompt_opens(chat_server: LiveServer) -> None:
    kwargs = {"open_thoughts": True}
    body = chat(chat_server, "thinking", messages=says("Hm.</think>Yes."), chat_template_kwargs=kwargs)
    answer = body["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("Hm.", "Yes.")
    cut = chat(chat_server, "thinking", messages=says("Hm, hm"), chat_template_kwargs=kwargs, max_tokens=3)
    answer = cut["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("Hm,", "")
    assert cut["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


def test_thoughts_of_every_candidate_count(chat_server: LiveServer) -> None:
    texts = "<think>Hm</think>a|||<think>Hm</think>b"
    usage = chat(chat_server, "thinking", messages=says(texts), best_of=2)["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 2 * (1 + 2 + 1)


def test_thoughts_in_a_continued_message(chat_server: LiveServer) -> None:
    messages = [*says("m.</think>Yes."), {"role": "assistant", "content": "<think>H"}]
    answer = message(chat_server, "thinking", messages=messages, continue_final_message=True)
    assert (answer["reasoning_content"], answer["content"]) == ("m.", "Yes.")


def test_answer_format_leaves_room_for_thoughts(chat_server: LiveServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    fields: dict[str, Any] = {"messages": says("GRAMMAR"), "response_format": form}
    grammar = message(chat_server, "thinking", **fields)["content"]
    assert "thoughts" in grammar
    assert '%json {"type": "object"' in grammar
    assert message(chat_server, **fields)["content"].startswith('{"type":"object"')
    choices = message(chat_server, "thinking", messages=says("GRAMMAR"), guided_choice=["yes", "no"])[
        "content"
    ]
    assert 'answer: "yes" | "no"' in choices
    pattern = message(chat_server, "thinking", messages=says("GRAMMAR"), guided_regex="a/b")["content"]
    assert r"answer: /a\/b/" in pattern
    own = message(chat_server, "thinking", messages=says("GRAMMAR"), guided_grammar='start: "<think>"')
    assert own["content"] == 'start: "<think>"'


def test_special_tokens_stay_out_of_the_content(chat_server: LiveServer) -> None:
    text = "a<|python_tag|>b"
    assert message(chat_server, messages=says(text))["content"] == "ab"
    assert message(chat_server, messages=says(text), skip_special_tokens=False)["content"] == text


BAD: list[tuple[str | None, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "a"}),
    ("messages", {"messages": ["a"]}),
    ("messages", {"messages": [{"role": "user"}]}),
    ("messages", {"messages": [{"content": "a"}]}),
    ("messages", {"messages": [{"role": "robot", "content": "a"}]}),
    ("messages", {"messages": [{"role": "user", "content": 5}]}),
    ("messages", {"messages": [{"role": "user", "content": []}]}),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
    ("messages", {"messages": [{"role": "user", "content": ["a"]}]}),
    ("messages", {"messages": [{"role": "tool", "content": "a"}]}),
    ("messages", {"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}),
    ("messages", {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}),
    ("messages", {"messages": [{"role": "assistant"}]}),
    ("messages", {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}),
    ("functions", {"functions": []}),
    ("function_call", {"function_call": "auto"}),
    ("add_generation_prompt", {"add_generation_prompt": 1}),
    ("reasoning_effort", {"reasoning_effort": "a lot"}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("audio", {"audio": {"format": "wav", "voice": "x"}}),
    ("temperature", {"temperature": 3}),
    ("n", {"n": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("stop", {"stop": ["a"] * 5}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD)
def test_wrong_fields_are_refused(chat_server: LiveServer, param: str, fields: dict[str, Any]) -> None:
    response = post(chat_server, **{"messages": user("a"), **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["prompt", "suffix", "echo", "mesages"])
def test_unknown_fields_are_refused_by_name(chat_server: LiveServer, name: str) -> None:
    given = refused(chat_server, name, code="unknown_parameter", messages=user("a"), **{name: "x"})
    assert name in given


def test_nulls_mean_not_given(chat_server: LiveServer) -> None:
    assistant = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    names = (
        "tools",
        "tool_choice",
        "response_format",
        "max_tokens",
        "functions",
        "logprobs",
        "stop",
        "audio",
    )
    nulls = dict.fromkeys(names)
    messages = [*user("a"), assistant, *says("c")]
    assert message(chat_server, messages=messages, **nulls)["content"] == "c"


def test_hosting_fields_are_taken_without_effect(chat_server: LiveServer) -> None:
    fields = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "seed": 1}
    body = chat(chat_server, messages=says("a"), prompt_cache_key="k", safety_identifier="s", **fields)
    assert "service_tier" not in body


def test_openai_client_chats(chat_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="chat/plain", messages=says("Hi"))  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "Hi"
        stream = client.chat.completions.create(
            model="chat/plain",
            messages=says("Hi there"),  # type: ignore[arg-type]
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hi there"
        image: Any = user("")
        image[0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
        with pytest.raises(openai.BadRequestError, match="image_url"):
            client.chat.completions.create(model="chat/plain", messages=image)

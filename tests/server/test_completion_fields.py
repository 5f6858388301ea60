"""Every row of the request table: values that are taken, values that are refused and how. No engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokenmill.server.completion_tools import check_tools
from tokenmill.server.errors import ApiError
from tokenmill.server.parse import parse_completion
from tokenmill.server.protocol import CompletionRequest


def parse(**fields: Any) -> CompletionRequest:
    return checked(json.dumps({"prompt": "a", **fields}).encode())


def checked(body: bytes) -> CompletionRequest:
    request = parse_completion(body)
    check_tools(request)
    return request


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        checked(body)
    assert caught.value.status == 400
    assert set(json.loads(caught.value.body())["error"]) == {"message", "type", "param", "code"}
    return caught.value


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

GOOD: dict[str, list[Any]] = {
    "model": ["a/b", "a/b/c"],
    "prompt": ["", "text", ["a", "b"], [0, 1], [[1], [2, 3]], [""]],
    "max_tokens": [0, 1, 10**6],
    "max_completion_tokens": [0, 1],
    "max_new_tokens": [0, 1],
    "min_tokens": [0, 3],
    "temperature": [0, 0.0, 1, 1e-300, 2],
    "top_p": [0.001, 1, 1.0],
    "top_k": [-1, 0, 1, 50],
    "min_p": [0, 0.5, 1],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0.5, 2],
    "repetition_penalty": [0.1, 1, 2],
    "logit_bias": [{}, {"0": -100, "7": 100, "9": 1.5}],
    "seed": [0, -(2**63), 2**63 - 1],
    "n": [1, 128],
    "best_of": [1, 128],
    "stop": ["x", ["x"], ["a", "b", "c", "d"], [], ["é" * 1024]],
    "stop_sequences": ["x", ["x"]],
    "stop_token_ids": [[], [0, 5]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "logprobs": [True, False, 0, 20],
    "return_token_log_probs": [True, False],
    "echo": [True],
    "stream": [True, False],
    "response_format": [
        {"type": "text"},
        {"type": "text", "json_schema": None},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a-b_1"}},
        {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "array"}, "strict": True, "description": "d"},
        },
        {"type": "json_schema", "json_schema": {"name": "a", "schema": None, "strict": None}},
    ],
    "guided_json": [{}, {"type": "object"}, "{}", '{"type": "string"}'],
    "guided_regex": ["a+"],
    "guided_choice": [["a"], ["a", "b"]],
    "guided_grammar": ['root ::= "a"'],
    "prediction": [
        {"type": "content", "content": "a"},
        {"type": "content", "content": ""},
        {"type": "content", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
    "tools": [[], [TOOL]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"], ["text", "audio"], ["audio", "text"]],
    "suffix": ["", "x"],
    "inference_timeout": [1, 0.5, "30", "0.5", 1e300],
    "timeout": [1, "2"],
    "inference_extra_params": [{}, {"top_k": 5}, {"top_k": None}],
    "extra_body": [{"min_p": 0.1}],
    "inference_extra_headers": [{"x-priority": "3"}, {}],
    "extra_headers": [{"X-Request-Id": "a"}],
    "user": ["u", "u" * 512],
    "skip_special_tokens": [True, False],
    "add_special_tokens": [True, False],
    "truncate_prompt_tokens": [1, 100],
    "prompt_logprobs": [0, 20],
    "return_token_ids": [True],
    "chat_template_kwargs": [{}],
    "priority": [-5, 0, 5],
    "store": [True],
    "metadata": [{"a": "b"}],
    "service_tier": ["auto"],
    "safety_identifier": ["s"],
    "prompt_cache_key": ["k"],
}

BAD: dict[str, list[Any]] = {
    "model": [1, True, ["a/b"]],
    "prompt": [
        [],
        [[]],
        [[1], []],
        ["a", 1],
        [1, "a"],
        [[1], "a"],
        [True],
        [1.0],
        [-1],
        [2**63],
        {},
        5,
        True,
        [[[1]]],
    ],
    "max_tokens": [-1, 1.0, "1", True, 1e3],
    "max_completion_tokens": [-1, "1"],
    "max_new_tokens": [-1, True],
    "min_tokens": [-1, "1", 1.5],
    "temperature": [-0.1, 2.1, "1", True, [], 10**400],
    "top_p": [0, -1, 1.1, "1", True],
    "top_k": [-2, 1.0, "5", True, 2**31],
    "min_p": [-0.1, 1.1, "0"],
    "presence_penalty": [-2.1, 2.1, "0", True],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "repetition_penalty": [0, -1, 2.1, "1"],
    "logit_bias": [
        [],
        {"a": 1},
        {"1.0": 1},
        {"-1": 1},
        {"01": 1},
        {"": 1},
        {"1": 101},
        {"1": -101},
        {"1": "1"},
        {"1": True},
    ],
    "seed": [2**63, -(2**63) - 1, 1.0, "1", True],
    "n": [0, 129, 10**9, 1.0, "1", True],
    "best_of": [0, 129, 10**9, 1.0, True],
    "stop": ["", [""], 5, [5], ["a" * 1025], "a" * 10**6, {}, True],
    "stop_sequences": ["", [5]],
    "stop_token_ids": [5, ["a"], [-1], [True], [1.0], [0] * 1025],
    "include_stop_str_in_output": [1, "true"],
    "ignore_eos": [1, "true"],
    "logprobs": [21, -1, 1.0, "1", [], 10**30],
    "top_logprobs": [21, -1, True, 1.0],
    "return_token_log_probs": [1, "true"],
    "echo": [1, "true"],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, True, []],
    "response_format": [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "two words"}},
        {"type": "json_schema", "json_schema": {"name": "a" * 65}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}},
        {"type": "json_schema", "json_schema": {"name": "a", "strict": 1}},
        {"type": "json_object", "json_schema": {"name": "a"}},
        {"type": "text", "json_schema": {"name": "a"}},
        {"type": "x"},
        {},
        "text",
    ],
    "guided_json": [False, 5, [], "{", "[]", "5", "[" * 100_000],
    "guided_regex": ["", 5, "a" * ((1 << 20) + 1)],
    "guided_choice": [[], "a", [""], [5]],
    "guided_grammar": ["", 5],
    "tools": [5, [5], [{"type": "function"}], [{"type": "x", "function": {"name": "f"}}], [TOOL, TOOL]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, 5],
    "parallel_tool_calls": [1],
    "prediction": [
        {},
        "a",
        {"type": "content"},
        {"type": "text", "content": "a"},
        {"type": "content", "content": 5},
        {"type": "content", "content": []},
        {"type": "content", "content": [{"type": "image_url", "text": "a"}]},
        {"type": "content", "content": ["a"]},
    ],
    "modalities": [[], ["audio"], ["video"], "text", ["text", "audio", "text"]],
    "audio": [
        "wav",
        {},
        {"format": "wav", "voice": "alloy"},
        {"format": "aac"},
        {"voice": 1},
        {"voice": ""},
        {"voice": "x" * 65},
        {"voice": {"name": "alloy"}},
    ],
    "suffix": [5, ["x"], True],
    "inference_timeout": [0, -1, "x", "-1", "1e5", "", True, [], "nan", "inf"],
    "timeout": [0, "x"],
    "inference_extra_params": [
        [],
        "a",
        {"extra_body": {}},
        {"inference_extra_params": {}},
        {"temperature": 9},
    ],
    "extra_body": [5, {"unheard_of": 1}],
    "inference_extra_headers": [{"Authorization": "x"}, {"Host": "x"}, {"x-priority": 1}, []],
    "extra_headers": [
        {"x-api-key": "k"},
        {"cookie": "c"},
        {"Content-Length": "5"},
        {"Transfer-Encoding": "chunked"},
    ],
    "user": ["u" * 513, 5],
    "skip_special_tokens": [1],
    "add_special_tokens": [0],
    "truncate_prompt_tokens": [0, -1, 1.0],
    "prompt_logprobs": [-1, 21, True, 1.0],
    "return_token_ids": [1],
    "chat_template_kwargs": [{"a": 1}, 5],
    "reasoning_effort": ["low"],
    "priority": [1.0, "1", 2**31, True],
    "store": [1],
    "metadata": [{"a": 1}, [], {str(i): "" for i in range(17)}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in GOOD.items() for value in values]
)
def test_value_is_taken(field: str, value: Any) -> None:
    assert field in CompletionRequest.model_fields
    parse(**{field: value})


@pytest.mark.parametrize("field", [field for field in CompletionRequest.model_fields if field != "prompt"])
def test_null_means_not_given(field: str) -> None:
    assert parse(**{field: None}) == parse()
    assert field not in parse(**{field: None}).model_fields_set


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_value_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(json.dumps({"prompt": "a", field: value}).encode())
    inner = (
        set(value) if field in ("inference_extra_params", "extra_body") and isinstance(value, dict) else set()
    )
    assert error.param in {field, *inner}
    assert len(error.message) < 400


def test_every_field_is_tried() -> None:
    fields = set(CompletionRequest.model_fields)
    assert fields == set(GOOD) | set(BAD)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "presence_penalty", "inference_timeout", "logit_bias"]
)
def test_numbers_that_are_not_finite(field: str, text: str) -> None:
    value = f'{{"1": {text}}}' if field == "logit_bias" else text
    refusal(f'{{"prompt": "a", "{field}": {value}}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"5",
        b"[]",
        b"null",
        b'"a"',
        b'{"prompt": "a"',
        b'{"prompt": "a"} x',
        b"{'prompt': 'a'}",
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 "}',
        b'\xef\xbb\xbf{"prompt": "a"}',
    ],
)
def test_body_that_is_no_json_object(body: bytes) -> None:
    refusal(body)


def test_unknown_parameter_names_the_closest() -> None:
    error = refusal(b'{"prompt": "a", "temperatur": 1}')
    assert (error.code, error.param) == ("unknown_parameter", "temperatur")
    assert "temperature" in error.message
    assert refusal(b'{"prompt": "a", "stream": true, "stream_options": {"x": 1}}').code == "unknown_parameter"
    nested = {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "x": 1}}}
    error = refusal(json.dumps(nested).encode())
    assert (error.code, error.param) == ("unknown_parameter", "response_format.json_schema.x")
    long = refusal(b'{"prompt": "a", "' + b"x" * 10_000 + b'": 1}')
    assert len(long.body()) < 1000


def test_unknown_parameter_may_be_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    request = parse_completion(b'{"prompt": "a", "temperatur": 1, "top_k": 3}', warn_unknown=True)
    assert request.top_k == 3
    assert "temperatur" in caplog.text


def test_prompt_is_required() -> None:
    error = refusal(b"{}")
    assert (error.param, error.code) == ("prompt", "missing_parameter")


def test_aliases_may_agree_but_not_differ() -> None:
    assert parse(max_tokens=5, max_new_tokens=5).max_tokens == 5
    for fields in (
        {"max_tokens": 5, "max_new_tokens": 6},
        {"max_completion_tokens": 1, "max_new_tokens": 2},
        {"stop": "a", "stop_sequences": ["b"]},
        {"inference_timeout": 1, "timeout": 2},
        {"inference_extra_headers": {"x-priority": "1"}, "extra_headers": {}},
    ):
        with pytest.raises(ApiError, match="mean the same"):
            parse(**fields)


def test_extra_params_are_merged() -> None:
    request = parse(extra_body={"top_k": 5, "stream": True}, inference_extra_params={"min_p": 0.5})
    assert (request.top_k, request.stream, request.min_p) == (5, True, 0.5)
    assert parse(top_k=5, extra_body={"top_k": 5}).top_k == 5
    for fields in (
        {"top_k": 5, "extra_body": {"top_k": 6}},
        {"extra_body": {"top_k": 5}, "inference_extra_params": {"top_k": 6}},
        {"echo": True, "extra_body": {"echo": 1}},
    ):
        with pytest.raises(ApiError, match="given twice"):
            parse(**fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": 3}, "top_logprobs"),
        ({"return_token_log_probs": True, "logprobs": False}, "logprobs"),
        ({"return_token_log_probs": True, "logprobs": 5}, "logprobs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
        ({"suffix": "a", "echo": True, "logprobs": 0}, "echo"),
    ],
)
def test_conflicts_between_fields(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_best_of_equal_to_n_may_be_streamed() -> None:
    assert parse(best_of=1, stream=True).candidates == 1
    assert parse(n=3, best_of=3, stream=True).candidates == 3


def test_logprobs_are_decided_on_the_json_type() -> None:
    assert (parse(logprobs=True).alternatives, parse(logprobs=True).chat_logprobs) == (0, True)
    assert parse(logprobs=True, top_logprobs=7).alternatives == 7
    assert parse(return_token_log_probs=True).chat_logprobs
    assert (parse(logprobs=1).alternatives, parse(logprobs=1).chat_logprobs) == (1, False)
    assert parse(logprobs=0).alternatives == 0
    assert parse(logprobs=False).alternatives is None
    assert parse().alternatives is None


def test_sound_without_its_text_is_not_supported() -> None:
    with pytest.raises(ApiError) as caught:
        parse(modalities=["audio"])
    assert caught.value.code == "unsupported_modality"


def test_how_an_answer_is_spoken() -> None:
    spoken = {"modalities": ["text", "audio"]}
    assert parse(**spoken).audio is None
    assert parse(**spoken).speaks
    assert not parse(modalities=["text"]).speaks
    for voice in ("alloy", {"id": "alloy"}):
        options = parse(**spoken, audio={"format": "mp3", "voice": voice}).audio
        assert options is not None
        assert (options.format, options.voice) == ("mp3", "alloy")
    nulls = parse(**spoken, audio={"format": None, "voice": None}).audio
    assert nulls is not None
    assert (nulls.format, nulls.voice) == (None, None)
    assert parse(**spoken, audio={"format": "pcm16"}, stream=True).stream


@pytest.mark.parametrize(
    ("param", "fields"), [("audio", {"audio": {"format": "mp3"}, "stream": True}), ("echo", {"echo": True})]
)
def test_what_cannot_be_spoken(param: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "a", "modalities": ["text", "audio"], **fields}
    assert refusal(json.dumps(body).encode()).param == param


def test_message_says_what_is_allowed_and_what_was_given() -> None:
    error = refusal(b'{"prompt": "a", "temperature": 3}')
    assert error.message == "temperature must be at least 0 and at most 2, not 3"
    error = refusal(json.dumps({"prompt": "a", "top_p": "x" * 1000}).encode())
    assert error.message.startswith("top_p must be a number, not ")
    assert len(error.message) < 200
    error = refusal(b'{"prompt": "a", "seed": 9223372036854775808}')
    assert error.message == (
        "seed must be at least -9223372036854775808 and below 9223372036854775808, not 9223372036854775808"
    )
    error = refusal(b'{"prompt": "a", "guided_regex": ""}')
    assert error.message == 'guided_regex must be of length 1 or more, not ""'
    error = refusal(b'{"prompt": "a", "guided_choice": []}')
    assert error.message == "guided_choice must be of length 1 or more, not []"


def test_schema_documents_every_field() -> None:
    schema = CompletionRequest.model_json_schema()
    for name, field in schema["properties"].items():
        assert field.get("description"), name
        assert "default" in field or name == "prompt", name
        assert field.get("examples") or "anyOf" in field, name

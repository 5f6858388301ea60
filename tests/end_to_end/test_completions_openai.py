"""Completions of the real engine through the public openai client, on a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.types import Completion
from server_process import TINY, Server

PROMPT = "What grinds the grain?"
IDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Completion:
    known = {key: fields.pop(key) for key in list(fields) if key in ("extra_body", "stream_options")}
    settings: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields, **known}
    return client.completions.create(model=TINY, **settings)  # type: ignore[no-any-return]


def extra(client: openai.OpenAI, **fields: Any) -> Completion:
    """With fields that the client doesn't know."""
    settings = {key: fields.pop(key) for key in ("max_tokens", "seed", "temperature") if key in fields}
    return complete(client, **settings, extra_body=fields)


def test_single_completion(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=5)
    assert answer.usage is not None
    (choice,) = answer.choices
    assert choice.finish_reason in ("length", "stop")
    assert 1 <= answer.usage.completion_tokens <= 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    by_ids = complete(client, prompt=IDS, max_tokens=5)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 5
    assert not hasattr(by_ids.choices[0], "prompt_logprobs")


def test_truncated_prompt(client: openai.OpenAI) -> None:
    answer = extra(client, max_tokens=1, prompt=IDS, truncate_prompt_tokens=3, return_token_ids=True)
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["prompt_token_ids"] == IDS[-3:]


@pytest.mark.parametrize("count", [None, 0, 1, 5, 20])
def test_logprobs(client: openai.OpenAI, count: int | None) -> None:
    logprobs = complete(client, prompt=IDS, logprobs=count).choices[0].logprobs
    if count is None:
        assert logprobs is None
        return
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    # Alternatives that read alike are one.
    assert all(1 <= len(row) <= count + 1 for row in logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_logprobs(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, logprobs=21, stream=stream)
    assert complete(client).choices


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_prompt_logprobs(client: openai.OpenAI, count: int) -> None:
    fields = {"prompt": ["A mill may not injure a miller", "My name is"], "prompt_logprobs": count}
    if count < 0:
        with pytest.raises(openai.BadRequestError):
            extra(client, **fields)
        return
    for choice in extra(client, **fields).choices:
        assert choice.model_extra is not None
        first, *others = choice.model_extra["prompt_logprobs"]
        assert first is None
        assert others
        assert all(max(count, 1) <= len(row) <= count + 1 for row in others)


def test_stream_gives_the_same_text(client: openai.OpenAI) -> None:
    whole = complete(client).choices[0]
    chunks = list(complete(client, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text  # type: ignore[attr-defined]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]  # type: ignore[attr-defined]
    assert reasons == [None] * (len(reasons) - 1) + [whole.finish_reason]


def test_several_choices_are_different(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "max_tokens": 40, "temperature": 1.0, "seed": 42, "logprobs": 0}
    choices = complete(client, **fields).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.text for choice in choices}) == 3
    texts, reasons = ["", "", ""], []
    for chunk in complete(client, stream=True, **fields):
        (choice,) = chunk.choices  # type: ignore[attr-defined]
        texts[choice.index] += choice.text
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text for choice in choices]
    assert sorted(reasons) == sorted(choice.finish_reason for choice in choices)


@pytest.mark.parametrize("options", [{}, {"include_usage": False, "continuous_usage_stats": True}])
def test_stream_without_usage(client: openai.OpenAI, options: dict[str, bool]) -> None:
    for chunk in complete(client, stream=True, stream_options=options):
        assert chunk.usage is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("always", [False, True])
def test_stream_with_usage(client: openai.OpenAI, always: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": always}
    *chunks, last = complete(client, stream=True, stream_options=options)
    assert all((chunk.usage is not None) == always for chunk in chunks)  # type: ignore[attr-defined]
    assert last.choices == []  # type: ignore[attr-defined]
    usage = last.usage  # type: ignore[attr-defined]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0


@pytest.mark.parametrize(
    "options", [{"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": True}]
)
def test_stream_options_need_a_stream(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        complete(client, stream_options=options)


@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_batches(client: openai.OpenAI, prompt: Any) -> None:
    alone = complete(client, prompt=prompt).choices[0].text
    both = complete(client, prompt=[prompt] * 2)
    assert [choice.text for choice in both.choices] == [alone] * 2
    sampled = complete(client, prompt=[prompt] * 2, n=2, temperature=1, seed=5)
    texts = [choice.text for choice in sampled.choices]
    assert texts[0] != texts[1]
    assert texts[:2] == texts[2:]
    streamed = ["", ""]
    for chunk in complete(client, prompt=[prompt] * 2, stream=True):
        (choice,) = chunk.choices  # type: ignore[attr-defined]
        streamed[choice.index] += choice.text
    assert streamed == [alone] * 2


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("prompt", [PROMPT, IDS])
def test_echo_with_logprobs(client: openai.OpenAI, prompt: Any, max_tokens: int, count: int) -> None:
    answer = complete(client, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=count)
    (choice,) = answer.choices
    if isinstance(prompt, str):
        assert choice.text.startswith(prompt)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert all(max(count, 1) <= len(row) <= count + 1 for row in logprobs.top_logprobs[1:])
    assert answer.usage is not None
    lengths = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)}
    assert lengths == {answer.usage.total_tokens}
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_batches_of_ids_are_scored_as_one_by_one(client: openai.OpenAI) -> None:
    """What evaluation harnesses send: prefixes shared with each other and with what the cache holds."""
    prompts = [[*range(5, 40), last] for last in (50, 60, 70)] + [[5, 6], [9]]
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0}
    together = complete(client, prompt=prompts, **fields)
    for prompt, choice in zip(prompts, together.choices, strict=True):
        assert choice.logprobs is not None
        alone = complete(client, prompt=prompt, **fields).choices[0].logprobs
        assert alone is not None
        assert choice.logprobs.tokens == alone.tokens
        assert choice.logprobs.token_logprobs is not None
        assert alone.token_logprobs is not None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone.token_logprobs[1:], abs=1e-4)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["oat", "rye"]},
        "sacks": {"type": "integer", "minimum": 0, "maximum": 9},
        "fresh": {"type": "boolean"},
    },
    "required": ["kind", "sacks", "fresh"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_schema_is_followed(client: openai.OpenAI, seed: int) -> None:
    named = {"type": "json_schema", "json_schema": {"name": "flour", "schema": SCHEMA, "strict": True}}
    for fields in ({"response_format": named}, {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}):
        (choice,) = extra(client, max_tokens=400, temperature=1, seed=seed, **fields).choices
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        jsonschema.validate(value, SCHEMA)
        assert list(value) == ["kind", "sacks", "fresh"]


def test_other_grammars_are_followed(client: openai.OpenAI) -> None:
    for fields, allowed in (
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"guided_choice": ["to grind", "or not"]}, r"to grind|or not"),
        ({"guided_grammar": 'root ::= "m" ("i" | "o")+ "ll"'}, r"m[io]+ll"),
        ({"guided_grammar": 'start: "m" ("i" | "o")~2 "ll"'}, r"m[io]{2}ll"),
    ):
        (choice,) = extra(client, max_tokens=300, temperature=1, seed=3, **fields).choices
        assert choice.finish_reason == "stop", (fields, choice.text)
        assert re.fullmatch(allowed, choice.text)
    (choice,) = extra(
        client, max_tokens=60, temperature=1, seed=3, response_format={"type": "json_object"}
    ).choices
    assert choice.text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"properties": {"foo": "bar"}, "type": "object"}},
        {"guided_json": {"type": "strnig"}},
        {"guided_json": {"$ref": "#"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}},
        {"guided_regex": "[.*"},
        {"guided_grammar": "start: (("},
        {"guided_choice": []},
    ],
)
def test_what_can_not_be_compiled_is_named(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        extra(client, **fields)
    assert caught.value.param == next(iter(fields))
    assert complete(client).choices


def test_prediction_changes_nothing_but_speed(client: openai.OpenAI) -> None:
    plain = complete(client, max_tokens=60)
    prediction = {"type": "content", "content": plain.choices[0].text}
    drafted = extra(client, max_tokens=60, prediction=prediction)
    assert drafted.choices[0].text == plain.choices[0].text
    for usage in (plain.usage, drafted.usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
    counts = drafted.usage.completion_tokens_details  # type: ignore[union-attr]
    assert counts.accepted_prediction_tokens + counts.rejected_prediction_tokens > 0  # type: ignore[operator,union-attr]
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_echo_streamed_or_not(client: openai.OpenAI, stream: bool, echo: bool) -> None:
    answer: Any = complete(client, echo=echo, stream=stream)
    chunks = list(answer) if stream else [answer]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    plain = complete(client).choices[0]
    assert text == (PROMPT if echo else "") + plain.text
    assert chunks[-1].choices[0].finish_reason == plain.finish_reason


def test_logit_bias_forces_and_bans(client: openai.OpenAI) -> None:
    forced = complete(client, logit_bias={"77": 100}, logprobs=0, max_tokens=5)
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or ())) == 1
    free = extra(client, max_tokens=8, return_token_ids=True).choices[0]
    assert free.model_extra is not None
    ids = free.model_extra["token_ids"]
    banned = extra(
        client, max_tokens=8, return_token_ids=True, logit_bias=dict.fromkeys(map(str, ids), -100)
    ).choices[0]
    assert banned.model_extra is not None
    assert set(ids).isdisjoint(banned.model_extra["token_ids"])


@pytest.mark.parametrize("prompt", [None, [], [[]], [999_999], [5, -1], ["a", 5]])
def test_prompts_that_are_none(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt=prompt)
    assert caught.value.param == "prompt"
    assert complete(client).choices


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": 42}, "guided_json"),
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_formats_that_are_none(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        extra(client, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_schema_that_nothing_finite_satisfies_is_refused(client: openai.OpenAI, stream: bool) -> None:
    endless = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    with pytest.raises(openai.BadRequestError, match="no finite document") as caught:
        complete(client, stream=stream, extra_body={"guided_json": endless})
    assert caught.value.param == "guided_json"

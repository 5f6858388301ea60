"""The request table's rows that choose tokens: what each value means to the engine. Named by the field."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_engine import TOKENIZER, WIDTH

from tokenmill.engine.sampling_params import Grammar, SamplingParams
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.admission import Job, check_limits, make_job
from tokenmill.server.config_file import parse_config
from tokenmill.server.errors import ApiError
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.parse import parse_completion
from tokenmill.server.plan import make_plan

CONTEXT = 256
MODELS = """
models:
  a/b:
    source: x
    deployments:
      defaults: {sampling: {temperature: 0.5, top_k: 7, stop: [x], max_tokens: 9, seed: 4}}
      forced: {force: {temperature: 0, max_tokens: 3}}
"""
VARIANTS = make_plan(parse_config(MODELS)).variants


async def _no_fim(wanted: object) -> None:
    return None


ENGINE = cast(
    Engine,
    SimpleNamespace(
        context=CONTEXT,
        tokenizer=Tokenizer(TOKENIZER),
        ready=SimpleNamespace(logits_width=WIDTH),
        fim=_no_fim,
    ),
)


def job(variant: str = "a/b", headers: dict[str, str] | None = None, **fields: Any) -> Job:
    request = parse_completion(json.dumps({"prompt": "abc", **fields}).encode())
    check_limits(request, VARIANTS[variant])
    return asyncio.run(make_job(request, VARIANTS[variant], ENGINE, headers or {}, "salt"))


ROWS: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "max_tokens", 16),
    ({"max_tokens": 3}, "max_tokens", 3),
    ({"max_completion_tokens": 3}, "max_tokens", 3),
    ({"max_new_tokens": 0}, "max_tokens", 0),
    ({}, "min_tokens", 0),
    ({"min_tokens": 5}, "min_tokens", 5),
    ({}, "temperature", 1.0),
    ({"temperature": 0}, "temperature", 0.0),
    ({"temperature": 2}, "temperature", 2.0),
    ({}, "top_p", 1.0),
    ({"top_p": 0.25}, "top_p", 0.25),
    ({}, "top_k", 0),
    ({"top_k": 5}, "top_k", 5),
    ({"top_k": -1}, "top_k", -1),
    ({}, "min_p", 0.0),
    ({"min_p": 0.5}, "min_p", 0.5),
    ({"presence_penalty": -2}, "presence_penalty", -2.0),
    ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
    ({}, "repetition_penalty", 1.0),
    ({"repetition_penalty": 1.25}, "repetition_penalty", 1.25),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", 1e-6),
    ({"logit_bias": {"5": -100, "6": 1.5}}, "logit_bias", {5: -100.0, 6: 1.5}),
    ({}, "seed", None),
    ({"seed": -(2**63)}, "seed", -(2**63)),
    ({"n": 3}, "candidates", 3),
    ({"n": 2, "best_of": 5}, "candidates", 5),
    ({"stop": "x"}, "stop", ("x",)),
    ({"stop_sequences": ["x", "y"]}, "stop", ("x", "y")),
    ({"stop_token_ids": [5, 6]}, "stop_token_ids", (5, 6)),
    ({"include_stop_str_in_output": True}, "include_stop", True),
    ({"ignore_eos": True}, "ignore_eos", True),
    ({}, "logprobs", None),
    ({"logprobs": False}, "logprobs", None),
    ({"logprobs": True}, "logprobs", 0),
    ({"logprobs": True, "top_logprobs": 4}, "logprobs", 4),
    ({"return_token_log_probs": True}, "logprobs", 0),
    ({"logprobs": 0}, "logprobs", 0),
    ({"logprobs": 20}, "logprobs", 20),
    ({"n": 1, "best_of": 2}, "logprobs", 0),
    ({"echo": True}, "prompt_logprobs", None),
    ({"echo": True, "logprobs": 3}, "prompt_logprobs", 3),
    ({"logprobs": 3}, "prompt_logprobs", None),
    ({"prompt_logprobs": 0}, "prompt_logprobs", 0),
    ({"prompt_logprobs": 2, "echo": True, "logprobs": 5}, "prompt_logprobs", 5),
    ({"skip_special_tokens": False}, "skip_special_tokens", False),
    ({}, "grammar", None),
    ({"guided_regex": "a+"}, "grammar", Grammar("regex", "a+")),
    ({"response_format": {"type": "json_object"}}, "grammar", Grammar("json_schema", '{"type":"object"}')),
    ({"extra_body": {"top_k": 3}}, "top_k", 3),
    ({"inference_extra_params": {"min_p": 0.1}}, "min_p", 0.1),
]


@pytest.mark.parametrize(
    ("fields", "setting", "value"), ROWS, ids=[f"{row[1]}-{i}" for i, row in enumerate(ROWS)]
)
def test_setting_reaches_the_engine(fields: dict[str, Any], setting: str, value: Any) -> None:
    assert getattr(job(**fields).params, setting) == value


def test_every_setting_of_the_engine_is_some_rows() -> None:
    tried = {setting for _, setting, _ in ROWS} - {"candidates"} | {"n", "best_of"}
    assert tried == set(SamplingParams.__struct_fields__)


def test_defaults_of_a_deployment_give_way_and_forced_values_do_not() -> None:
    params = job("a/b/defaults").params
    assert (params.temperature, params.top_k, params.stop, params.max_tokens, params.seed) == (
        0.5,
        7,
        ("x",),
        9,
        4,
    )
    params = job("a/b/defaults", temperature=1, stop=[], max_new_tokens=2, seed=None).params
    assert (params.temperature, params.stop, params.max_tokens, params.seed) == (1.0, (), 2, 4)
    params = job("a/b/forced", temperature=0).params
    assert (params.temperature, params.max_tokens) == (0.0, 3)
    for fields in ({"temperature": 1}, {"max_tokens": 4}, {"max_completion_tokens": 4}):
        with pytest.raises(ApiError, match="is fixed at"):
            job("a/b/forced", **fields)


def test_priority_is_the_fields_or_the_headers() -> None:
    assert job().priority == 0
    assert job(priority=-3).priority == -3
    assert job(headers={"x-priority": "4"}).priority == 4
    assert job(headers={"x-priority": "4"}, priority=1).priority == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {str(WIDTH): 1}}, "logit_bias"),
        ({"stop_token_ids": [WIDTH]}, "stop_token_ids"),
        ({"prompt": [WIDTH]}, "prompt"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"stop": list("abcde")}, "stop"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_does_not_fit_the_model_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        job(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)

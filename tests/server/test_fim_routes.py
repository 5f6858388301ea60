"""`POST /v1/fim/completions` and `POST /infill`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FIM_TOKENIZER, FIM_TOKENS
from live_server import LiveServer, events
from waiting import eventually

from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.config_file import parse_config
from tokenmill.server.fim_answers import LineRules
from tokenmill.server.fim_protocol import FimRequest, InfillRequest
from tokenmill.server.fim_routes import completion_of_fim, completion_of_infill

TOY = Tokenizer(FIM_TOKENIZER)
PREFIX, SUFFIX, MIDDLE, FILE = (TOY.encode(token, add_special_tokens=False)[0] for token in FIM_TOKENS)
MODELS = """
version: 1
models:
  toy/fim: {source: "fake:fim=1,step_s=0.002", max_context: 256}
  toy/plain:
    source: "fake:"
    max_context: 256
    deployments: {rerank: {suffix: rerank}}
"""


@pytest.fixture(scope="module")
def editors() -> Iterator[LiveServer]:
    with LiveServer(parse_config(MODELS)) as live:
        yield live


def fim(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.client.post("/v1/fim/completions", json={"model": "toy/fim", **fields})


def infill(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.client.post("/infill", json={"model": "toy/fim", **fields})


def plain(text: str) -> list[int]:
    return TOY.encode(text, add_special_tokens=False)


def refused(response: httpx.Response, param: str | None) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    return str(error["message"])


def test_mistral_shape(editors: LiveServer) -> None:
    body = fim(editors, prompt="abc", suffix="xy", max_tokens=4, temperature=0).json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    usage = body.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 4, 13)
    message = {"role": "assistant", "content": "abcx", "tool_calls": None}
    assert body == {
        "object": "chat.completion",
        "model": "toy/fim",
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
    }


def test_mistral_stream(editors: LiveServer) -> None:
    *chunks, done = events(fim(editors, prompt="abc", suffix="", max_tokens=3, stream=True, temperature=0))
    assert done == "[DONE]"
    rows = [json.loads(chunk) for chunk in chunks]
    assert {row["object"] for row in rows} == {"chat.completion.chunk"}
    assert rows[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(row["choices"][0]["delta"]["content"] for row in rows) == "abc"
    assert [row["choices"][0]["finish_reason"] for row in rows][-1] == "length"
    assert [("usage" in row) for row in rows] == [False] * (len(rows) - 1) + [True]


def test_mistral_fields(editors: LiveServer) -> None:
    def text(**fields: Any) -> str:
        return str(fim(editors, **fields).json()["choices"][0]["message"]["content"])

    assert text(prompt="abcdef", max_tokens=6, random_seed=0, stop=["d"]) == "abc"
    assert text(prompt="abcdef", max_tokens=2, random_seed=2) == "cd"
    long = fim(editors, prompt="ab", temperature=0).json()
    assert long["usage"]["total_tokens"] == 256
    assert fim(editors, prompt="a", max_tokens=1, metadata={"a": 1}, suffix=None).status_code == 200


def test_mistral_shape_with_the_penalties_that_editors_add() -> None:
    request = completion_of_fim(FimRequest(prompt="a", presence_penalty=0.5, frequency_penalty=-1.0))
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -1.0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "suffix": 5}, "suffix"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"prompt": "a", "random_seed": "1"}, "random_seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "suffix": "x", "model": "toy/plain"}, "suffix"),
    ],
)
def test_mistral_values_that_are_refused(editors: LiveServer, fields: dict[str, Any], param: str) -> None:
    refused(fim(editors, **fields), param)


def test_mistral_shape_without_tokens_for_it(editors: LiveServer) -> None:
    body = fim(editors, model="toy/plain", prompt="abc", max_tokens=3, temperature=0).json()
    assert body["choices"][0]["message"]["content"] == "abc"
    body = fim(editors, model="toy/plain/rerank", prompt="abc", suffix="xy", max_tokens=3).json()
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] == 12


def test_infill_shape(editors: LiveServer) -> None:
    body = infill(editors, input_prefix="abc", input_suffix="xy", n_predict=4, temperature=0).json()
    timings = body.pop("timings")
    assert (timings["prompt_n"], timings["predicted_n"]) == (9, 4)
    assert all(timings[key] >= 0 for key in timings)
    assert body == {
        "index": 0,
        "content": "abcx",
        "tokens": [],
        "stop": True,
        "id_slot": -1,
        "model": "toy/fim",
        "tokens_predicted": 4,
        "tokens_evaluated": 9,
        "tokens_cached": 0,
        "truncated": False,
        "stop_type": "limit",
        "stopping_word": "",
        "has_new_line": False,
    }


def test_infill_stream(editors: LiveServer) -> None:
    response = infill(
        editors, input_prefix="abc", n_predict=5, temperature=0, stream=True, return_tokens=True
    )
    rows = [json.loads(event) for event in events(response)]
    assert "".join(row["content"] for row in rows) == "abcab"
    assert [token for row in rows for token in row["tokens"]] == plain("abcab")
    assert [row["stop"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["stop_type"] == "limit"


def test_infill_stream_keeps_ids_of_half_characters(editors: LiveServer) -> None:
    """Tokens without text of their own come with the text that they become."""
    response = infill(
        editors, input_prefix="é漢", n_predict=5, temperature=0, stream=True, return_tokens=True
    )
    rows = [json.loads(event) for event in events(response)]
    assert "".join(row["content"] for row in rows) == "é漢"
    assert [token for row in rows for token in row["tokens"]] == plain("é漢")


def test_infill_prompt_follows_the_middle_token(editors: LiveServer) -> None:
    body = infill(
        editors, input_prefix="ab", input_suffix="x", prompt="cd", n_predict=5, temperature=0
    ).json()
    assert (body["content"], body["tokens_evaluated"]) == ("abxcd", 9)
    everything = infill(editors, input_prefix="a", n_predict=-1, temperature=0).json()
    assert everything["tokens_evaluated"] + everything["tokens_predicted"] == 256


def test_infill_extra_files_come_first(editors: LiveServer) -> None:
    files = [{"filename": "f", "text": "<file_sep>"}, {"text": "g"}]
    body = infill(editors, input_extra=files, input_prefix="ab", n_predict=4, temperature=0).json()
    context = (
        3
        + len(plain("f\n"))
        + len("<file_sep>")
        + len(plain("\n"))
        + len(plain("\ng\n"))
        + len(plain("current\n"))
    )
    assert body["tokens_evaluated"] == 1 + context + len([PREFIX, *plain("ab"), SUFFIX, MIDDLE])
    assert body["content"].startswith("f\n")
    body = infill(
        editors, model="toy/plain", input_extra=files, input_prefix="ab", n_predict=4, temperature=0
    ).json()
    assert body["content"] == "f\n<f"


def test_infill_stops(editors: LiveServer) -> None:
    body = infill(editors, input_prefix="abcd", n_predict=9, stop=["c"], temperature=0).json()
    assert (body["content"], body["stop_type"], body["stopping_word"]) == ("ab", "word", "c")
    body = infill(editors, input_prefix="abcd", n_predict=9, stop=["c", "x"], temperature=0).json()
    assert (body["stop_type"], body["stopping_word"]) == ("word", "")
    fields = {"input_prefix": "abcd", "n_predict": 200, "seed": -1, "repeat_penalty": 1.1, "ignore_eos": True}
    assert infill(editors, **fields).json()["stop_type"] == "limit"


@pytest.mark.parametrize("stream", [False, True])
def test_infill_ends_at_a_line_with_less_indentation(editors: LiveServer, stream: bool) -> None:
    fields = {"input_prefix": "a\n  b\n c", "n_predict": 60, "temperature": 0, "stream": stream}

    def content(**more: Any) -> str:
        response = infill(editors, **fields, **more)
        if not stream:
            return str(response.json()["content"])
        return "".join(json.loads(event)["content"] for event in events(response))

    assert content(n_indent=2) == "a\n  b\n "
    assert content(n_indent=1).startswith("a\n  b\n ca\n  b\n ca")
    eventually(editors.is_idle)


def test_infill_ends_at_a_new_line_after_the_time(editors: LiveServer) -> None:
    fields = {"input_prefix": "abcdefgh\n", "temperature": 0, "ignore_eos": True}
    body = infill(editors, **fields, n_predict=200, t_max_predict_ms=1).json()
    assert body["tokens_predicted"] < 200
    assert body["has_new_line"]
    body = infill(editors, input_prefix="ab", temperature=0, n_predict=100, t_max_predict_ms=1).json()
    assert body["tokens_predicted"] == 100, "the first line is always finished"


def test_infill_fields_of_the_answer(editors: LiveServer) -> None:
    wanted = ["content", "timings/prompt_n", "timings/none", "generation_settings/n_predict", "truncated"]
    body = infill(editors, input_prefix="ab", n_predict=1, temperature=0, response_fields=wanted).json()
    assert body == {"content": "a", "timings/prompt_n": 6, "truncated": False}


def test_what_the_editors_plug_in_sends(editors: LiveServer) -> None:
    response = infill(
        editors,
        id_slot=0,
        input_prefix="a",
        input_suffix="b",
        input_extra=[{"text": "x", "time": [1, 2], "filename": "f"}],
        prompt="",
        n_predict=8,
        stop=[],
        n_indent=0,
        top_k=40,
        top_p=0.9,
        stream=False,
        samplers=["top_k", "top_p", "infill"],
        cache_prompt=True,
        t_max_prompt_ms=500,
        t_max_predict_ms=1000,
        response_fields=["content"],
    )
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n_predict": -2}, "n_predict"),
        ({"n_indent": -1}, "n_indent"),
        ({"t_max_predict_ms": -1}, "t_max_predict_ms"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra"),
        ({"input_prefix": 5}, "input_prefix"),
        ({"top_k": -2}, "top_k"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"mirostat": 1}, "mirostat"),
        ({"samplers": "top_k"}, "samplers"),
        ({"samplers": ["top_k", "nonsense"]}, "samplers"),
        ({"samplers": [["top_k"]]}, "samplers"),
        ({"cache_prompt": 1}, "cache_prompt"),
        ({"id_slot": -2}, "id_slot"),
        ({"t_max_prompt_ms": -1}, "t_max_prompt_ms"),
        ({"response_fields": [1]}, "response_fields"),
    ],
)
def test_infill_values_that_are_refused(editors: LiveServer, fields: dict[str, Any], param: str) -> None:
    refused(infill(editors, **fields), param)


def test_only_the_listed_filters_act() -> None:
    settings = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "presence_penalty": 1.0}

    def sent(**fields: Any) -> dict[str, Any]:
        infill_request = InfillRequest(**settings, repeat_penalty=1.5, **fields)
        given = completion_of_infill(infill_request).model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if name not in ("prompt", "suffix")}

    assert sent() == sent(samplers=None) == {**settings, "repetition_penalty": 1.5}
    assert sent(samplers=["penalties"]) == {"presence_penalty": 1.0, "repetition_penalty": 1.5}
    assert sent(samplers=["top-k", "infill", "temp"]) == {"top_k": 5, "temperature": 0.5}
    assert sent(samplers=[]) == sent(samplers=["dry", "xtc"]) == {}


def test_editors_may_leave_out_the_model(server: LiveServer) -> None:
    response = server.client.post("/infill", json={"input_prefix": "abc", "n_predict": 2, "temperature": 0})
    assert (response.json()["content"], response.json()["model"]) == ("ab", "toy/echo")


class Spoken:
    """Stands for a choice."""

    def __init__(self) -> None:
        self.text, self.finish_reason, self.first = "", None, 0.0


@pytest.mark.parametrize(
    "pieces", [["  a\n    b\n  c"], list("  a\n    b\n  c"), ["  a\n  ", "  b", "\n ", " c"]]
)
def test_lines_are_the_same_however_they_come(pieces: list[str]) -> None:
    rules, choice = LineRules(4, 0), Spoken()
    for piece in pieces:
        choice.text += piece
        rules(choice, piece, 0.0)  # type: ignore[arg-type]
        if choice.finish_reason:
            break
    assert (choice.text, choice.finish_reason) == ("  a\n    b\n  ", "length")

"""Completions over a real socket, answered by the scripted engine: shapes, echo, stops, scores, usage."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fake_engine import EOS, TOKENIZER, WIDTH, logprob
from live_server import MODEL, LiveServer, events

from tokenmill.engine.tokenizer import Tokenizer

TOY = Tokenizer(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOY.encode(text)


def choice(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.complete(**fields)
    assert response.status_code == 200, response.text
    (only,) = response.json()["choices"]
    return dict(only)


def refused(
    server: LiveServer, param: str | None, code: str | None = None, status: int = 400, **fields: Any
) -> str:
    response = server.complete(**fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    return str(error["message"])


def test_answer_has_the_documented_shape(server: LiveServer) -> None:
    body = server.complete(model="echo", prompt="abc", max_tokens=4, temperature=0).json()
    assert body["id"].startswith("cmpl-")
    assert len(body["id"]) >= 5 + 24
    assert isinstance(body["created"], int)
    del body["id"], body["created"]
    assert body == {
        "object": "text_completion",
        "model": "echo",
        "system_fingerprint": "fake-1",
        "choices": [{"index": 0, "text": "abca", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
                "reasoning_tokens": 0,
                "audio_tokens": 0,
            },
        },
    }


def test_gateway_route_is_the_same_handler(server: LiveServer) -> None:
    body = server.client.post("/v4/beta/completions", json={"prompt": "abc", "max_tokens": 2}).json()
    assert body["choices"][0]["text"] == "ab"


def test_sixteen_tokens_unless_told(server: LiveServer) -> None:
    assert choice(server, prompt="abc")["text"] == "abcabcabcabcabca"
    assert choice(server, prompt="abc", max_new_tokens=2)["text"] == "ab"
    assert choice(server, prompt="abc", max_completion_tokens=0)["text"] == ""


def test_model_names(server: LiveServer) -> None:
    for name in (MODEL, "echo", f"{MODEL}/greedy", None):
        body = server.complete(model=name, prompt="abc", max_tokens=1).json()
        assert body["model"] == (name or MODEL)
    message = refused(server, "model", "model_not_found", 404, model="toy/ecko", prompt="a")
    assert "toy/echo" in message
    refused(server, "model", "model_not_found", 404, model="", prompt="a")


def test_choices_come_prompt_by_prompt(server: LiveServer) -> None:
    body = server.complete(prompt=["abc", "xyz"], n=2, max_tokens=3).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [
        (0, "abc"),
        (1, "acb"),
        (2, "xyz"),
        (3, "xzy"),
    ]
    assert body["usage"]["prompt_tokens"] == 8
    assert body["usage"]["completion_tokens"] == 12


def test_prompts_as_ids(server: LiveServer) -> None:
    assert choice(server, prompt=ids("abc"), max_tokens=3)["text"] == "abc"
    body = server.complete(prompt=[ids("abc"), ids("xyz")], max_tokens=2).json()
    assert [c["text"] for c in body["choices"]] == ["ab", "xy"]


def test_ids_outside_the_vocabulary(server: LiveServer) -> None:
    for prompt in ([WIDTH], [0, 2**31 - 1], [[0], [WIDTH]], [-1], [2**63], [True], [1.0]):
        refused(server, "prompt", prompt=prompt)
    assert server.complete(prompt=[WIDTH - 1], max_tokens=1).status_code == 200


def test_empty_prompts(server: LiveServer) -> None:
    answer = choice(server, prompt="", max_tokens=1, return_token_ids=True)
    assert answer["prompt_token_ids"] == [TOKENIZER.bos_id]
    answer = choice(server, prompt="", max_tokens=1, return_token_ids=True, add_special_tokens=False)
    assert answer["prompt_token_ids"] == [TOKENIZER.bos_id]
    for prompt in ([], [[]], [[1], []]):
        refused(server, "prompt", prompt=prompt)


def test_special_tokens_of_prompts(server: LiveServer) -> None:
    answer = choice(server, prompt="ab</s>", max_tokens=1, return_token_ids=True)
    assert answer["prompt_token_ids"] == [TOKENIZER.bos_id, *ids("ab")[1:], EOS]
    answer = choice(server, prompt="ab", max_tokens=1, return_token_ids=True, add_special_tokens=False)
    assert answer["prompt_token_ids"] == ids("ab")[1:]


def test_truncated_prompts_keep_their_end(server: LiveServer) -> None:
    answer = choice(
        server, prompt="abcdef", max_tokens=3, truncate_prompt_tokens=2, return_token_ids=True, echo=True
    )
    assert answer["prompt_token_ids"] == ids("ef")[1:]
    assert answer["text"] == "efefe"
    assert choice(server, prompt=ids("abc"), max_tokens=2, truncate_prompt_tokens=1)["text"] == "cc"
    assert choice(server, prompt="x" * 5000, max_tokens=2, truncate_prompt_tokens=100)["text"] == "xx"


def test_context_length(server: LiveServer) -> None:
    assert server.complete(prompt=[0] * 2000, max_tokens=48).status_code == 200
    for fields, param in (
        ({"prompt": [0] * 2000, "max_tokens": 49}, "max_tokens"),
        ({"prompt": [0] * 2048}, "prompt"),
        ({"prompt": "ab" * 2000}, "prompt"),
        ({"prompt": "a", "max_tokens": 10**12}, "max_tokens"),
        ({"prompt": "ab" * 100_000}, "prompt"),
    ):
        message = refused(server, param, "context_length_exceeded", **fields)
        assert "This model's maximum context length is 2048 tokens" in message


def test_long_prompts_are_encoded_like_short_ones(server: LiveServer) -> None:
    text = "the " * 8000
    answer = choice(server, prompt=text, max_tokens=1, truncate_prompt_tokens=2000, return_token_ids=True)
    assert answer["prompt_token_ids"] == ids(text)[-2000:]


def test_stop_strings(server: LiveServer) -> None:
    for stop in ("ca", ["zz", "ca"], ["ca", "abcab"]):
        answer = choice(server, prompt="abc", stop=stop)
        assert (answer["text"], answer["finish_reason"]) == ("ab", "stop")
    assert choice(server, prompt="abc", stop="ca", include_stop_str_in_output=True)["text"] == "abca"
    assert choice(server, prompt="abc", stop="ca", min_tokens=5)["text"] == "abcab"
    assert choice(server, prompt="abc", stop_sequences=["b"])["text"] == "a"
    assert choice(server, prompt="abc", stop=[])["finish_reason"] == "length"
    refused(server, "stop", prompt="a", stop=["a", "b", "c", "d", "e"])
    refused(server, "stop", prompt="a", stop=["x"] * 1000)


def test_stop_counts_tokens_through_the_one_that_completed_it(server: LiveServer) -> None:
    body = server.complete(prompt="abc", stop="bc", n=2, return_token_ids=True).json()
    assert body["choices"][0]["text"] == "a"
    assert body["usage"]["completion_tokens"] == 3 + 16


def test_stop_token_ids(server: LiveServer) -> None:
    (c,) = ids("c")[1:]
    answer = choice(server, prompt="abc", stop_token_ids=[c], return_token_ids=True)
    assert (answer["text"], answer["finish_reason"]) == ("ab", "stop")
    assert answer["token_ids"] == ids("abc")[1:]
    assert choice(server, prompt="abc", stop_token_ids=[c], include_stop_str_in_output=True)["text"] == "abc"
    refused(server, "stop_token_ids", prompt="a", stop_token_ids=[WIDTH])


def test_min_tokens_above_max_tokens(server: LiveServer) -> None:
    refused(server, "min_tokens", prompt="a", min_tokens=5, max_tokens=4)
    refused(server, "min_tokens", prompt="a", min_tokens=17)


def test_logit_bias(server: LiveServer) -> None:
    (z,) = ids("z")[1:]
    assert choice(server, prompt="abc", logit_bias={str(z): 100}, max_tokens=3)["text"] == "zzz"
    assert str(WIDTH) in refused(server, "logit_bias", prompt="a", logit_bias={str(WIDTH): 1})


def test_legacy_logprobs(server: LiveServer) -> None:
    answer = choice(server, prompt="abc", max_tokens=3, logprobs=2)
    logprobs = answer["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    a, b, c = ids("abc")[1:]
    assert logprobs["token_logprobs"] == [logprob(a, 0), logprob(b, 1), logprob(c, 2)]
    assert "content" not in logprobs
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    only = choice(server, prompt="abc", max_tokens=1, logprobs=0)["logprobs"]["top_logprobs"]
    assert only == [{"a": logprob(a, 0)}]


def test_chat_shaped_logprobs(server: LiveServer) -> None:
    answer = choice(server, prompt="a€", max_tokens=4, logprobs=True, top_logprobs=2)
    content = answer["logprobs"]["content"]
    assert answer["text"] == "a€"
    assert [row["token"] for row in content] == ["a", "�", "�", "�"]
    assert [row["bytes"] for row in content] == [[97], [0xE2], [0x82], [0xAC]]
    assert [len(row["top_logprobs"]) for row in content] == [2] * 4
    best = content[0]["top_logprobs"]
    assert best[0]["logprob"] >= best[1]["logprob"]
    assert answer["logprobs"]["tokens"] == ["a", "�", "�", "�"]
    assert answer["logprobs"]["text_offset"] == [0, 1, 1, 1]
    assert answer["logprobs"]["refusal"] is None
    plain = choice(server, prompt="abc", max_tokens=1, return_token_log_probs=True)["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_tokens_past_a_stop_leave_every_array(server: LiveServer) -> None:
    answer = choice(server, prompt="abcd", stop="cd", logprobs=True, return_token_ids=True)
    assert answer["text"] == "ab"
    assert answer["logprobs"]["tokens"] == ["a", "b"]
    assert len(answer["logprobs"]["content"]) == 2
    assert answer["token_ids"] == ids("ab")[1:]


def test_eos_is_listed_without_text(start: Any) -> None:
    live = start('models: {toy/echo: {source: "fake:eos_after=2"}}')
    answer = choice(live, prompt="abc", logprobs=1, return_token_ids=True)
    assert (answer["text"], answer["finish_reason"]) == ("ab", "stop")
    assert answer["token_ids"] == [*ids("ab")[1:], EOS]
    assert answer["logprobs"]["tokens"] == ["a", "b", "</s>"]
    assert answer["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice(live, prompt="abc", ignore_eos=True, max_tokens=5)["text"] == "abcab"
    assert choice(live, prompt="abc", skip_special_tokens=False)["text"] == "ab"


def test_echo_without_logprobs(server: LiveServer) -> None:
    assert choice(server, prompt="abc", echo=True, max_tokens=3)["text"] == "abcabc"
    assert choice(server, prompt=ids("abc"), echo=True, max_tokens=2)["text"] == "abcab"
    assert choice(server, prompt="abc", echo=True, max_tokens=0)["text"] == "abc"
    assert choice(server, prompt="a\ud7ff</s>", echo=True, max_tokens=0)["text"] == "a\ud7ff</s>"


def test_echo_with_logprobs_scores_the_prompt(server: LiveServer) -> None:
    answer = choice(server, prompt="the cat", echo=True, logprobs=1, max_tokens=2)
    logprobs = answer["logprobs"]
    assert answer["text"] == "the cat c"
    assert logprobs["tokens"] == ["<s>", "the", " ", "c", "a", "t", " ", "c"]
    assert logprobs["text_offset"] == [0, 0, 3, 4, 5, 6, 7, 8]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:6] == [logprob(t, i) for i, t in enumerate(ids("the cat")[1:], 1)]


def test_scoring_only(server: LiveServer) -> None:
    answer = choice(server, prompt=ids("abc"), echo=True, logprobs=0, max_tokens=0)
    assert (answer["text"], answer["finish_reason"]) == ("abc", "length")
    assert answer["logprobs"]["tokens"] == ["<s>", "a", "b", "c"]
    body = server.complete(prompt=[ids("abc"), [5]], echo=True, logprobs=1, max_tokens=0).json()
    assert [len(c["logprobs"]["tokens"]) for c in body["choices"]] == [4, 1]
    assert body["usage"]["completion_tokens"] == 0


def test_offsets_of_an_echoed_prompt_with_special_tokens(server: LiveServer) -> None:
    answer = choice(server, prompt="a</s>b", echo=True, logprobs=0, max_tokens=1)
    assert answer["logprobs"]["text_offset"] == [0, 0, 1, 5, 6]
    answer = choice(server, prompt=ids("a</s>b"), echo=True, logprobs=0, max_tokens=1)
    assert answer["text"] == "aba"
    assert answer["logprobs"]["text_offset"] == [0, 0, 1, 1, 2]


def test_prompt_logprobs(server: LiveServer) -> None:
    rows = choice(server, prompt="abc", prompt_logprobs=2, max_tokens=1)["prompt_logprobs"]
    assert rows[0] is None
    prompt = ids("abc")
    for position, token in enumerate(prompt[1:], 1):
        row = rows[position][str(token)]
        assert row["logprob"] == logprob(token, position)
        assert row["decoded_token"] == TOY.token_text(token)
        assert row["rank"] in (1, 2)
    bare = choice(server, prompt="abc", prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]
    assert bare[1] == {str(prompt[1]): {"logprob": logprob(prompt[1], 1), "rank": None, "decoded_token": "a"}}


def test_best_of_returns_the_likeliest(server: LiveServer) -> None:
    everything = server.complete(prompt="abcdefg", n=4, max_tokens=5, logprobs=0).json()["choices"]
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 5 for c in everything}
    body = server.complete(prompt="abcdefg", n=2, best_of=4, max_tokens=5).json()
    assert [c["text"] for c in body["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert [c["index"] for c in body["choices"]] == [0, 1]
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 20


def test_limits_of_an_entry(server: LiveServer) -> None:
    forced = f"{MODEL}/forced"
    refused(server, "n", model=forced, prompt="a", n=3)
    refused(server, "logprobs", model=forced, prompt="a", logprobs=4)
    refused(server, "top_logprobs", model=forced, prompt="a", logprobs=True, top_logprobs=4)
    refused(server, "prompt_logprobs", model=forced, prompt="a", prompt_logprobs=4)
    refused(server, "prompt", prompt=["a"] * 100_000)
    refused(server, "prompt", prompt=["a"] * 9, n=128)


def test_forced_and_default_settings(server: LiveServer) -> None:
    forced = f"{MODEL}/forced"
    assert choice(server, model=forced, prompt="abc")["text"] == "abca"
    assert choice(server, model=forced, prompt="abc", temperature=0, max_new_tokens=4)["text"] == "abca"
    refused(server, "temperature", model=forced, prompt="a", temperature=1)
    refused(server, "max_new_tokens", model=forced, prompt="a", max_new_tokens=5)
    greedy = server.complete(model=f"{MODEL}/greedy", prompt="abc", n=2, max_tokens=3).json()["choices"]
    assert [c["text"] for c in greedy] == ["abc", "abc"]
    warm = server.complete(model=f"{MODEL}/greedy", prompt="abc", n=2, max_tokens=3, temperature=1).json()[
        "choices"
    ]
    assert [c["text"] for c in warm] == ["abc", "acb"]


def test_cached_tokens_are_reported(server: LiveServer) -> None:
    usage = server.complete(prompt=[0] * 40, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}


def test_request_id_is_echoed_and_used_for_nothing_else(server: LiveServer) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] != "mine-1"
    response = server.complete(prompt="a", extra_headers={"X-Request-Id": "other"})
    assert response.headers["x-request-id"] == "other"
    response = server.client.post(
        "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "x" * 1000}
    )
    assert response.headers["x-request-id"] == response.json()["id"]
    assert server.complete().headers["x-request-id"].startswith("cmpl-")


def test_same_client_request_id_twice_has_no_cross_talk(server: LiveServer) -> None:
    texts: dict[str, str] = {}

    def ask(prompt: str) -> None:
        headers = {"x-request-id": "twin"}
        body = {"prompt": prompt, "max_tokens": 200}
        texts[prompt] = server.client.post("/v1/completions", json=body, headers=headers).json()["choices"][
            0
        ]["text"]

    threads = [threading.Thread(target=ask, args=(letter,)) for letter in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {letter: letter * 200 for letter in "abcdef"}


def test_priority_from_field_or_header(server: LiveServer) -> None:
    for headers in ({"x-priority": "high"}, {"x-priority": str(2**40)}):
        response = server.client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.json()["error"]["param"] == "x-priority"
        assert server.client.post(
            "/v1/completions", json={"prompt": "a", "priority": 1}, headers=headers
        ).is_success
    assert server.complete(prompt="a", extra_headers={"x-priority": "-3"}).is_success


def test_gateway_stream_ends_without_done(server: LiveServer) -> None:
    response = server.client.post(
        "/v4/beta/completions", json={"prompt": "abc", "stream": True, "max_tokens": 2}
    )
    assert all(event.startswith("{") for event in events(response))


@pytest.mark.parametrize("text", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_content_type_that_is_not_json(server: LiveServer, text: str) -> None:
    headers = {"content-type": text} if text else {}
    response = server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_content_type_with_a_charset(server: LiveServer) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).is_success

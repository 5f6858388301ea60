"""`/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_engine import EOS, TOKENIZER, WIDTH
from live_server import LiveServer

from tokenmill.engine.tokenizer import Tokenizer

TOY = Tokenizer(TOKENIZER)
BOS = TOKENIZER.bos_id


def tokenize(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.client.post("/tokenize", json=fields)


def detokenize(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.client.post("/detokenize", json=fields)


def test_text_becomes_ids(server: LiveServer) -> None:
    body = tokenize(server, prompt="the an").json()
    ids = TOY.encode("the an")
    assert body == {"count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
    bare = tokenize(server, prompt="the an", add_special_tokens=False, model="echo").json()
    assert bare["tokens"] == ids[1:]
    assert tokenize(server, prompt="", add_special_tokens=False).json()["tokens"] == []


def test_texts_of_the_tokens(server: LiveServer) -> None:
    body = tokenize(server, prompt="thé", return_token_strs=True).json()
    assert body["token_strs"] == ["<s>", "th", "\ufffd", "\ufffd"]


def test_special_tokens_in_the_text_are_parsed(server: LiveServer) -> None:
    assert tokenize(server, prompt="a</s>").json()["tokens"][-1] == EOS


def test_long_text(server: LiveServer) -> None:
    assert tokenize(server, prompt="x" * 50_000).json()["count"] == 50_001


def test_ids_become_text(server: LiveServer) -> None:
    ids = TOY.encode("the an")
    assert detokenize(server, tokens=ids).json() == {"prompt": "<s>the an"}
    assert detokenize(server, tokens=ids[1:], model="echo").json() == {"prompt": "the an"}
    assert detokenize(server, tokens=[]).json() == {"prompt": ""}
    assert detokenize(server, tokens=[WIDTH - 1]).json() == {"prompt": ""}
    assert len(detokenize(server, tokens=ids[1:2] * 30_000).json()["prompt"]) == 3 * 30_000


def test_there_and_back(server: LiveServer) -> None:
    text = "thé Ünïcode, 漢字 and 🦀\n\ttabs"
    tokens = tokenize(server, prompt=text, add_special_tokens=False).json()["tokens"]
    assert detokenize(server, tokens=tokens).json()["prompt"] == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ({"prompt": "a", "promt": "b"}, "promt"),
    ],
)
def test_tokenize_refuses(server: LiveServer, fields: dict[str, Any], param: str) -> None:
    response = tokenize(server, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("tokens", [None, "a", [WIDTH], [-1], [1.0], [True], [2**63], [[1]]])
def test_detokenize_refuses(server: LiveServer, tokens: Any) -> None:
    response = detokenize(server, tokens=tokens)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"


def test_unknown_models(server: LiveServer) -> None:
    for response in (
        tokenize(server, prompt="a", model="x/y"),
        detokenize(server, tokens=[1], model="x/y"),
        server.client.get("/tokenizer_info", params={"model": "x/y"}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_tokenizer_info(server: LiveServer) -> None:
    for params in ({}, {"model": "echo"}):
        body = server.client.get("/tokenizer_info", params=params).json()
        assert body["model"] == "toy/echo"
        assert (body["bos_token"], body["eos_token"]) == ("<s>", "</s>")
        assert (body["bos_token_id"], body["eos_token_ids"]) == (BOS, [EOS])
        assert (body["model_max_length"], body["vocab_size"]) == (2048, TOKENIZER.vocab_size)
        assert body["chat_template"] == TOKENIZER.chat_template


def test_conversation_becomes_ids(chat_server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = tokenize(chat_server, model="chat/plain", messages=messages, return_token_strs=True).json()
    assert "".join(body["token_strs"]) == "<s>[user]Hi\n[assistant]"
    assert body["count"] == len(body["tokens"])
    open_end = tokenize(
        chat_server, model="chat/plain", messages=messages, add_generation_prompt=False
    ).json()
    assert body["tokens"][: open_end["count"]] == open_end["tokens"]
    assert tokenize(chat_server, model="chat/plain", messages=messages, add_special_tokens=True).json() == {
        **body,
        "token_strs": None,
    }


def test_model_without_a_template_refuses_conversations(server: LiveServer) -> None:
    response = tokenize(server, messages=[{"role": "user", "content": "Hi"}])
    assert response.status_code == 400

"""`prediction`: what reaches the engine, and how its drafts are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_server import LiveServer

from tokenmill.server.config_file import parse_config

MODELS = """
version: 1
models:
  toy/echo:
    source: "fake:"
    max_context: 512
    deployments: {plain: {speculation: {prediction: false}}}
"""


@pytest.fixture(scope="module")
def drafting() -> Iterator[LiveServer]:
    with LiveServer(parse_config(MODELS)) as live:
        yield live


def content(text: Any) -> dict[str, Any]:
    return {"type": "content", "content": text}


def drafts(server: LiveServer, **fields: Any) -> tuple[str, int, int]:
    """The text (abcabc), the accepted and the rejected drafts; the toy accepts what the prediction holds."""
    body = server.complete(prompt="abc", max_tokens=6, temperature=0, **fields).json()
    details = body["usage"]["completion_tokens_details"]
    accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    return body["choices"][0]["text"], accepted, rejected


def test_drafts_are_counted(drafting: LiveServer) -> None:
    assert drafts(drafting, prediction=content("xaby")) == ("abcabc", 4, 2)
    assert drafts(drafting, prediction=content("xyz")) == ("abcabc", 0, 6)


def test_parts_are_one_text(drafting: LiveServer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}]
    assert drafts(drafting, prediction=content(parts)) == ("abcabc", 4, 2)


def test_no_special_tokens_in_it(drafting: LiveServer) -> None:
    """The toy would accept `<s>`'s text if it were written there, never the token."""
    assert drafts(drafting, prediction=content("<s>")) == ("abcabc", 0, 6)


def test_an_empty_one_is_none(drafting: LiveServer) -> None:
    assert drafts(drafting, prediction=content("")) == ("abcabc", 0, 0)
    assert drafts(drafting) == ("abcabc", 0, 0)


def test_entry_that_does_not_draft(drafting: LiveServer) -> None:
    assert drafts(drafting, model="toy/echo/plain", prediction=content("abc")) == ("abcabc", 0, 0)


def test_every_choice_counts_but_not_beyond_its_stop(drafting: LiveServer) -> None:
    assert drafts(drafting, n=2, prediction=content("abc"))[1:] == (12, 0)
    assert drafts(drafting, stop="c", prediction=content("abc")) == ("ab", 3, 0)


def test_longer_than_any_answer(drafting: LiveServer) -> None:
    assert drafts(drafting, prediction=content("abc" * 200_000)) == ("abcabc", 6, 0)

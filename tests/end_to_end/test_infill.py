"""llama.cpp's `/infill` through the real engine."""

from __future__ import annotations

from typing import Any

from server_process import TINY, Server

CODE = "def add(a, b):\n    return a + b\n\n" * 8


def infill(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": TINY, "input_prefix": CODE, "n_predict": 4, "temperature": 0, **fields}
    response = server.post("/infill", body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_earlier_prompts_are_reused_unless_the_request_says_no(server: Server) -> None:
    alone = infill(server, cache_prompt=False)
    infill(server)
    reused, again = infill(server), infill(server, cache_prompt=False)
    assert (alone["tokens_cached"], again["tokens_cached"]) == (0, 0)
    assert reused["tokens_cached"] > 0
    assert alone["content"] == reused["content"] == again["content"]

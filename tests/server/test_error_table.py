"""The error table: for each status when it comes, in the one shape that errors have. Named by the status."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import MODEL, LiveServer
from waiting import eventually

ROUTES = (
    "/v1/completions",
    "/v4/beta/completions",
    "/v1/chat/completions",
    "/v1/fim/completions",
    "/infill",
    "/tokenize",
    "/detokenize",
)

LEAST: dict[str, dict[str, Any]] = {
    "/infill": {},
    "/detokenize": {"tokens": [1]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
"""Bodies that will do, where a prompt won't."""


def check(response: httpx.Response, status: int, kind: str, code: str | None) -> dict[str, Any]:
    """The error of a response, whose shape and status are as documented."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, code)
    assert isinstance(error["message"], str)
    assert "Traceback" not in error["message"]
    return dict(error)


@pytest.mark.parametrize("path", ROUTES)
def test_400(server: LiveServer, path: str) -> None:
    for body in (b"", b"{", b"[]", b'{"prompt": NaN}'):
        response = server.client.post(path, content=body, headers={"content-type": "application/json"})
        assert check(response, 400, "invalid_request_error", None)["param"] is None
    response = server.client.post(path, json={**LEAST.get(path, {"prompt": "a"}), "unheard_of": 1})
    assert check(response, 400, "invalid_request_error", "unknown_parameter")["param"] == "unheard_of"


@pytest.mark.parametrize("path", [*ROUTES, "/v1/models", "/tokenizer_info", "/metrics", "/nothing"])
def test_401(start: Callable[..., LiveServer], path: str) -> None:
    server = start(keys=("secret",))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
        response = server.client.request("POST" if path in ROUTES else "GET", path, headers=headers)
        error = response.json()["error"]
        assert (response.status_code, set(error)) == (401, {"message", "type", "param", "code"})
        assert "secret" not in response.text


@pytest.mark.parametrize("path", ROUTES)
def test_404(server: LiveServer, path: str) -> None:
    body = LEAST.get(path, {"prompt": "a"})
    response = server.client.post(path, json={**body, "model": "toy/ecko"})
    error = check(response, 404, "invalid_request_error", "model_not_found")
    assert error["param"] == "model"
    assert "toy/echo" in error["message"]
    check(server.client.post(path + "/x", json=body), 404, "invalid_request_error", "not_found")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/completions", "/v1/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/api/generate", None),
        ("/" + "a" * 60_000, None),
    ],
)
def test_404_of_a_path_names_the_nearest(server: LiveServer, path: str, meant: str | None) -> None:
    message = check(server.client.get(path), 404, "invalid_request_error", "not_found")["message"]
    guess = re.search("did you mean ([^ ?]*)[?]", message)
    assert (guess and guess[1]) == meant


@pytest.mark.parametrize("path", ROUTES)
def test_405(server: LiveServer, path: str) -> None:
    response = server.client.get(path)
    check(response, 405, "invalid_request_error", "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ROUTES)
def test_413(server: LiveServer, path: str) -> None:
    content = b'{"prompt": "' + b"x" * (17 << 20) + b'"}'
    response = server.client.post(path, content=content, headers={"content-type": "application/json"})
    check(response, 413, "invalid_request_error", None)


@pytest.mark.parametrize("path", ROUTES)
def test_415(server: LiveServer, path: str) -> None:
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    for headers in ({}, {"content-type": "text/plain"}, packed):
        check(server.client.post(path, content=b"{}", headers=headers), 415, "invalid_request_error", None)


def test_429(start: Callable[..., LiveServer]) -> None:
    text = 'server: {max_queue: 1}\nmodels: {a/b: {source: "fake:", max_batch: 1}}'
    server = start(text)
    with ThreadPoolExecutor(6) as pool:
        with server.paused():
            calls = [pool.submit(server.complete, prompt="a", max_tokens=2) for _ in range(6)]
            eventually(lambda: sum(call.done() for call in calls) == 4)
            refused = [call.result() for call in calls if call.done()]
        assert sorted(call.result().status_code for call in calls) == [200, 200, 429, 429, 429, 429]
    for answer in refused:
        check(answer, 429, "rate_limit_error", "queue_full")
        assert int(answer.headers["retry-after"]) >= 1


def test_499_is_only_in_the_log(start: Callable[..., LiveServer], caplog: pytest.LogCaptureFixture) -> None:
    server = start('models: {a/b: {source: "fake:step_s=0.05", max_context: 20000}}')
    with caplog.at_level(logging.INFO):
        with server.open(prompt="a", max_tokens=10_000):
            eventually(lambda: server.model.started == 1)
        eventually(lambda: any("/v1/completions 499 " in record.getMessage() for record in caplog.records))
    assert server.complete(prompt="a", max_tokens=1).status_code == 200


def test_500(server: LiveServer) -> None:
    response = server.complete(model=MODEL, prompt="NANROW", max_tokens=9)
    error = check(response, 500, "server_error", "internal_error")
    assert "/secret" not in error["message"]
    assert response.headers["x-request-id"] in error["message"]


def test_503(start: Callable[..., LiveServer]) -> None:
    text = 'server: {load_wait_s: 0}\nmodels: {a/b: {source: "fake:load_s=600"}}'
    server = start(text)
    for response in (server.complete(prompt="a"), server.client.post("/tokenize", json={"prompt": "a"})):
        check(response, 503, "service_unavailable_error", "model_loading")
        assert int(response.headers["retry-after"]) >= 1


def test_504(start: Callable[..., LiveServer]) -> None:
    server = start('models: {a/b: {source: "fake:step_s=0.1", max_context: 20000}}')
    response = server.complete(prompt="a", max_tokens=10_000, inference_timeout=0.3)
    error = check(response, 504, "timeout_error", "timeout")
    assert error["param"] == "inference_timeout"
    assert response.headers["x-should-retry"] == "false"


def test_504_of_the_entry(start: Callable[..., LiveServer]) -> None:
    """No field of the request is at fault where the model's own deadline has passed."""
    server = start('models: {a/b: {source: "fake:step_s=0.1", timeout_s: 0.3}}')
    response = server.complete(prompt="a", max_tokens=200)
    assert check(response, 504, "timeout_error", "timeout")["param"] is None

"""The routes beside completions: access, models, probes, metrics, documentation, the framework's errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from live_server import MODEL, ONE_MODEL, LiveServer
from waiting import eventually

from tokenmill.server.config_file import parse_config

KEYS = ("first-key", "schlüssel")


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    """A server with keys."""
    with LiveServer(parse_config(ONE_MODEL), keys=KEYS) as live:
        yield live


PATHS = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("GET", f"/health/{MODEL}"),
    ("GET", "/metrics"),
    ("GET", "/docs/"),
    ("GET", "/docs/../metrics"),
    ("POST", f"/v1/models/{MODEL}/load"),
    ("POST", f"/v1/models/{MODEL}/unload"),
    ("GET", "/playground"),
    ("GET", "/playground/"),
    ("POST", "/v1/completions"),
    ("POST", "/v4/beta/completions"),
    ("GET", "/nothing"),
    ("GET", "//live"),
    ("GET", "/live/"),
    ("GET", "/Live"),
    ("GET", "/health/../v1/models"),
    ("GET", "/live%2f..%2fv1/models"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": "first-ke"},
        {"x-api-key": b"schl\xfcssel"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
def test_without_a_key_nothing_but_the_public_paths(
    locked: LiveServer, method: str, path: str, headers: dict[str, Any]
) -> None:
    """Row 20 of the fault table."""
    # The whole URL: as a relative one, //live would name a host.
    response = locked.client.request(method, locked.url + path, headers=headers)
    assert response.status_code == 401, path
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "first-key" not in response.text


def test_keys_open_everything(locked: LiveServer) -> None:
    for headers in (
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer first-key"},
        {"x-api-key": "first-key"},
        {"x-api-key": "schlüssel".encode()},
        {"authorization": "Basic zzz", "x-api-key": "first-key"},
    ):
        assert locked.client.get("/v1/models", headers=headers).status_code == 200, headers
    for path in ("/live", "/health"):
        assert locked.client.get(path).status_code in (200, 503)


def test_models(server: LiveServer) -> None:
    body = server.client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [row["id"] for row in body["data"]] == [MODEL, f"{MODEL}/greedy", f"{MODEL}/forced"]
    row = body["data"][1]
    assert {**row, "created": 0} == {
        "id": f"{MODEL}/greedy",
        "object": "model",
        "created": 0,
        "owned_by": "toy",
        "root": MODEL,
        "max_model_len": 2048,
        "status": "loaded",
    }
    assert server.client.get(f"/v1/models/{MODEL}/greedy").json() == row
    assert server.client.get("/v1/models/echo").json()["id"] == MODEL
    missing = server.client.get("/v1/models/toy/eco")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert MODEL in missing.json()["error"]["message"]


def test_probes(server: LiveServer) -> None:
    assert server.client.get("/live").json() == {"status": "ok"}
    assert server.client.get("/health").json() == {"status": "ok", "models": {MODEL: "loaded"}}
    assert server.client.get(f"/health/{MODEL}").json()["state"] == "loaded"
    assert server.client.get(f"/health/{MODEL}/greedy").status_code == 200
    assert server.client.get("/health/no/such").status_code == 404


def metric(text: str, name: str, labels: str = "") -> float:
    found = re.search(rf'^tokenmill_{name}{{model="{MODEL}"{labels}}} (\S+)$', text, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def test_metrics(start: Callable[..., LiveServer]) -> None:
    live = start()
    assert live.complete(prompt="abc", n=2, max_tokens=5).is_success
    assert live.complete(prompt="abc", temperature=9).status_code == 400
    assert live.complete(prompt=[10**6]).status_code == 400
    assert live.complete(prompt="abc", timeout=0.001, max_tokens=2000).status_code == 504
    eventually(live.is_idle)
    response = live.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    text = response.text
    assert metric(text, "requests_total", ',outcome="200"') == 1
    assert metric(text, "requests_total", ',outcome="400"') == 1, (
        "the first was refused before a model was known"
    )
    assert metric(text, "requests_total", ',outcome="504"') == 1
    assert metric(text, "running") == metric(text, "waiting") == metric(text, "used_blocks") == 0
    assert metric(text, "free_blocks") > 0
    assert metric(text, "generated_tokens_total") >= 10
    assert metric(text, "prompt_tokens_total") >= 4
    assert metric(text, "inter_token_seconds_count") >= 8
    buckets = [float(value) for value in re.findall(r"first_token_seconds_bucket{.*} (\S+)", text)]
    assert buckets == sorted(buckets)
    assert metric(text, "time_to_first_token_seconds_count") == buckets[-1]
    assert metric(text, "request_seconds_count") == 1, "errors have no length"
    assert 0 < metric(text, "request_seconds_sum") < 300
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) tokenmill_\w+ .+|tokenmill_\w+({.+})? [0-9.e+-]+", line), line


def test_unknown_routes_and_methods(server: LiveServer) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/models/", 405),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/completions/", 404),
    ):
        response = server.client.request(method, path)
        assert response.status_code == status, path
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert server.client.get("/v1/completions").headers["allow"] == "POST"
    for path, hint in (
        ("/chat/completions", "did you mean /v1/chat/"),
        ("/v1/responses", "/v1/chat/completions and"),
    ):
        assert hint in server.client.post(path, json={}).json()["error"]["message"]


def test_an_unforeseen_failure_is_a_500_of_fixed_text(
    start: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("boom in /home/someone")

    live = start()
    before = live.canary()
    with monkeypatch.context() as broken:
        broken.setattr("tokenmill.server.completions.check_limits", fail)
        response = live.complete(prompt="abc")
    assert response.status_code == 500
    assert "boom" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]
    assert "boom" in caplog.text
    eventually(live.is_idle)
    assert live.canary() == before


def test_openapi_document_is_complete(server: LiveServer) -> None:
    document = server.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    request = schemas["CompletionRequest"]
    for path in ("/v1/completions", "/v4/beta/completions"):
        operation = document["paths"][path]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/CompletionRequest"
        assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(
            operation["responses"]
        )
        assert "422" not in operation["responses"]
    validator = Draft202012Validator({**request, "components": document["components"]})
    for body in ({"prompt": "a", "n": None}, {"prompt": [[1]], "stream_options": {}, "logprobs": True}):
        assert validator.is_valid(body)
    for body in (
        {},
        {"prompt": "a", "n": 0},
        {"prompt": 5},
        {"prompt": "a", "x": 1},
        {"prompt": "a", "top_p": 0},
    ):
        assert not validator.is_valid(body)
    answer = Draft202012Validator({**schemas["CompletionResponse"], "components": document["components"]})
    full = server.complete(
        prompt="abc", logprobs=True, top_logprobs=2, echo=True, return_token_ids=True, prompt_logprobs=1
    )
    answer.validate(full.json())
    answer.validate(server.complete(prompt="abc").json())
    error = Draft202012Validator({**schemas["ErrorResponse"], "components": document["components"]})
    error.validate(server.complete(prompt="abc", n=0).json())


def test_documentation_page(server: LiveServer) -> None:
    assert server.client.get("/docs").status_code == 200

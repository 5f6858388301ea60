"""The OpenAPI document: it validates, and every field says what it means and what it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from chat_live import CALL, TOOLS, chat, says
from live_server import LiveServer
from openapi_spec_validator import validate

from tokenmill.server.api_docs import FILES
from tokenmill.server.parse import ALIASES, EXTRA_PARAMS

ROUTES = {
    "/v1/completions": "CompletionRequest",
    "/v4/beta/completions": "CompletionRequest",
    "/v1/chat/completions": "ChatRequest",
    "/v1/fim/completions": "FimRequest",
    "/infill": "InfillRequest",
    "/tokenize": "TokenizeRequest",
    "/detokenize": "DetokenizeRequest",
}


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    return dict(server.client.get("/openapi.json").json())


def test_document_validates(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize("path", ROUTES)
def test_examples_of_bodies_work(
    document: dict[str, Any], server: LiveServer, chat_server: LiveServer, path: str
) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    own = chat_server if "chat" in path else server
    model = "chat/plain" if "chat" in path else "toy/echo"
    answer = own.client.post(path, json={"model": model, **content["example"]})
    assert answer.status_code == 200, answer.text


def test_page_shows_it_to_everybody(start: Callable[..., LiveServer]) -> None:
    """A browser sends no key with a page or its files."""
    server = start(keys=("secret",))
    page = server.client.get("/docs")
    assert "/openapi.json" in page.text
    for name, kind in FILES.items():
        assert f"/docs/{name}" in page.text
        assert server.client.get(f"/docs/{name}").headers["content-type"].startswith(kind)
    document = server.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize("path", ROUTES)
def test_route_has_schemas(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    assert operation["summary"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": f"#/components/schemas/{ROUTES[path]}"}
    check(document, operation["requestBody"]["content"]["application/json"]["example"], body)
    answers = operation["responses"]
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(answers)
    assert "422" not in answers
    streams = "text/event-stream" in answers["200"]["content"]
    assert streams == ("completions" in path or path == "/infill")


ANSWERS = {
    "/v1/models": "ModelList",
    "/v1/models/{model_id}": "ModelRow",
    "/health": "HealthResponse",
    "/health/{model_id}": "ModelHealthResponse",
    "/live": "LiveResponse",
    "/tokenizer_info": "TokenizerInfoResponse",
}


@pytest.mark.parametrize("path", ANSWERS)
def test_other_routes_have_schemas(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["get"]
    answer = {"$ref": f"#/components/schemas/{ANSWERS[path]}"}
    statuses = ["200", "503"] if path.startswith("/health") else ["200"]
    for status in statuses:
        assert operation["responses"][status]["content"]["application/json"]["schema"] == answer
    assert not {"413", "415", "429", "504"} & set(operation["responses"])
    for parameter in operation.get("parameters", ()):
        assert parameter["description"]
        assert parameter["schema"].get("examples") or parameter["examples"]


@pytest.mark.parametrize(("path", "missing"), [("load", set()), ("unload", {"409"})])
def test_orders_have_schemas(document: dict[str, Any], path: str, missing: set[str]) -> None:
    operation = document["paths"][f"/v1/models/{{model_id}}/{path}"]["post"]
    answers = operation["responses"]
    assert answers["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ModelRow"
    }
    expected = {"200", "400", "401", "403", "404", "409", "413", "415", "500", "503"} - missing
    assert set(answers) == expected
    assert "admin key" in operation["description"]
    assert "requestBody" not in operation


def test_metrics_are_text(document: dict[str, Any]) -> None:
    content = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert content == {"text/plain": {"schema": {"type": "string"}}}


ASKED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "/v1/models": ("/v1/models", None),
    "/v1/models/{model_id}": ("/v1/models/toy/echo", None),
    "/health": ("/health", None),
    "/health/{model_id}": ("/health/toy/echo", None),
    "/live": ("/live", None),
    "/tokenizer_info": ("/tokenizer_info", None),
    "/v1/completions": (
        "/v1/completions",
        {
            "prompt": "abc",
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        },
    ),
    "/v4/beta/completions": ("/v4/beta/completions", {"prompt": "abc", "logprobs": 2, "echo": True}),
    "/v1/fim/completions": ("/v1/fim/completions", {"prompt": "abc", "max_tokens": 2}),
    "/infill": ("/infill", {"input_prefix": "abc", "n_predict": 2, "return_tokens": True}),
    "/tokenize": ("/tokenize", {"prompt": "abc", "return_token_strs": True}),
    "/detokenize": ("/detokenize", {"tokens": [1, 2]}),
}


@pytest.mark.parametrize("path", ASKED)
def test_answers_are_as_described(document: dict[str, Any], server: LiveServer, path: str) -> None:
    url, body = ASKED[path]
    answer = server.client.get(url) if body is None else server.client.post(url, json=body)
    assert answer.status_code == 200, answer.text
    operation = document["paths"][path]["get" if body is None else "post"]
    check(document, answer.json(), operation["responses"]["200"]["content"]["application/json"]["schema"])


def test_chats_are_answered_as_described(document: dict[str, Any], chat_server: LiveServer) -> None:
    fields = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    for said in ("hello", CALL):
        schema = {"$ref": "#/components/schemas/ChatResponse"}
        check(document, chat(chat_server, "hermes", messages=says(said), **fields), schema)


def test_errors_are_as_described(document: dict[str, Any], server: LiveServer) -> None:
    for answer in (server.complete(), server.client.get("/v1/models/none"), server.client.get("/none")):
        check(document, answer.json(), {"$ref": "#/components/schemas/ErrorResponse"})


def check(document: dict[str, Any], value: Any, schema: dict[str, Any]) -> None:
    """The value is one that the schema, with the document's components, allows."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_errors_of_every_route(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert {"401", "500"} <= set(operation["responses"])
            assert ("404" in operation["responses"]) >= ("{" in path)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def requests(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], bool]]:
    """Every field of every object that a request may hold: object, name, schema, required."""
    schemas = document["components"]["schemas"]
    seen: set[str] = set()
    fields = []
    queue = list(ROUTES.values())
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for field, schema in schemas[name]["properties"].items():
            fields.append((name, field, schema, field in schemas[name].get("required", ())))
            queue += [reference.rsplit("/", 1)[1] for reference in references(schema)]
    return fields


def references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for key, item in value.items() if key != "examples" for found in references(item)]
    return []


def test_every_field_is_described(document: dict[str, Any]) -> None:
    fields = requests(document)
    assert len(fields) > 100
    for where, name, schema, required in fields:
        assert required or "default" in schema, (where, name)
    for where, name, schema in properties(document):
        assert schema.get("description"), (where, name)
        assert schema.get("examples"), (where, name)


def properties(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Every field of every object, in requests and in answers: object, name, schema."""
    schemas = document["components"]["schemas"]
    found = [
        (where, name, field)
        for where in schemas
        for name, field in schemas[where].get("properties", {}).items()
    ]
    assert len(found) > 200
    return found


def test_every_example_is_one_of_its_field(document: dict[str, Any]) -> None:
    for where, name, schema in properties(document):
        for example in schema["examples"]:
            try:
                check(document, example, schema)
            except jsonschema.ValidationError as error:
                pytest.fail(f"{where}.{name}: {error.message}")


def test_examples_of_one_object_agree(document: dict[str, Any]) -> None:
    fields = {
        name: schema["examples"][0]
        for where, name, schema in properties(document)
        if where == "CompletionRequest"
    }
    for names in ALIASES.values():
        assert len({str(fields[name]) for name in names}) == 1, names
    for extra in EXTRA_PARAMS:
        assert all(fields[name] == value for name, value in fields[extra].items())
    assert fields["logprobs"] is True or not fields["top_logprobs"]
    assert fields["stream"] or not fields["stream_options"]
    assert fields["n"] == fields["best_of"]
    assert fields["min_tokens"] <= fields["max_tokens"]


def test_a_text_or_a_conversation_is_tokenized(document: dict[str, Any], server: LiveServer) -> None:
    schema = {"$ref": "#/components/schemas/TokenizeRequest"}
    text, talk = {"prompt": "abc"}, {"messages": [{"role": "user", "content": "abc"}]}
    check(document, text, schema)
    check(document, {**talk, "prompt": None}, schema)
    for wrong in ({}, {**text, **talk}):
        with pytest.raises(jsonschema.ValidationError):
            check(document, wrong, schema)
        assert server.client.post("/tokenize", json=wrong).status_code == 400


def test_every_number_and_text_of_a_request_has_its_bounds(document: dict[str, Any]) -> None:
    for where, name, schema, _ in requests(document):
        for option in schema.get("anyOf", [schema]):
            if option.get("type") in ("integer", "number") and "const" not in option:
                bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
                assert bounds & set(option) or name in UNBOUNDED, (where, name)


UNBOUNDED = {"index"}
"""Accepted without effect."""

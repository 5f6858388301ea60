"""The OpenAPI document: it validates, and every field says what it means and what it may be."""

from __future__ import annotations

from typing import Any

import pytest
from live_server import LiveServer
from openapi_spec_validator import validate

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


def test_page_shows_it(server: LiveServer) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text


@pytest.mark.parametrize("path", ROUTES)
def test_route_has_schemas(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    assert operation["summary"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": f"#/components/schemas/{ROUTES[path]}"}
    answers = operation["responses"]
    assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(answers)
    assert "422" not in answers
    streams = "text/event-stream" in answers["200"]["content"]
    assert streams == ("completions" in path or path == "/infill")


def test_other_routes_are_there(document: dict[str, Any]) -> None:
    paths = {"/v1/models", "/v1/models/{model_id}", "/health", "/live", "/metrics", "/tokenizer_info"}
    assert paths <= set(document["paths"])


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
        assert schema.get("description"), (where, name)
        assert schema.get("examples"), (where, name)
        assert required or "default" in schema, (where, name)


def test_every_number_and_text_of_a_request_has_its_bounds(document: dict[str, Any]) -> None:
    for where, name, schema, _ in requests(document):
        for option in schema.get("anyOf", [schema]):
            if option.get("type") in ("integer", "number") and "const" not in option:
                bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
                assert bounds & set(option) or name in UNBOUNDED, (where, name)


UNBOUNDED = {"index"}
"""Accepted without effect."""

"""The OpenAPI document: bodies are read by handlers of our own, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.protocol_responses import CompletionResponse, ErrorResponse

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "A field is wrong.",
    "401": "No key, or a wrong one.",
    "404": "Unknown model.",
    "413": "The body is too large.",
    "415": "The body isn't JSON.",
    "429": "The queue is full.",
    "500": "A fault of the server.",
    "503": "The model is loading or down, or the server is shutting down.",
    "504": "The request's deadline has passed.",
}


def add_completion_schemas(app: FastAPI, paths: Sequence[str]) -> None:
    """Give these routes their request and response schemas."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (CompletionRequest, CompletionResponse, ErrorResponse):
                schema = model.model_json_schema(ref_template=_REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            _allow_null(schemas["CompletionRequest"])
            for path in paths:
                document["paths"][path]["post"].update(_completion_operation())
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completion_operation() -> dict[str, Any]:
    def content(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}

    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    answers = {"200": {"description": "The completion.", "content": content("CompletionResponse") | stream}}
    errors = {
        status: {"description": text, "content": content("ErrorResponse")} for status, text in _ERRORS.items()
    }
    return {
        "requestBody": {"required": True, "content": content("CompletionRequest")},
        "responses": answers | errors,
    }


def _allow_null(schema: dict[str, Any]) -> None:
    """Null means "not given" for every field that may be left out."""
    for name, field in schema["properties"].items():
        options = field.get("anyOf", [])
        if name in schema.get("required", ()) or {"type": "null"} in options:
            continue
        outer = {
            key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field
        }
        inner = dict(field)
        field.clear()
        field.update({"anyOf": [inner, {"type": "null"}], **outer})

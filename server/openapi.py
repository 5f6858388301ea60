"""The OpenAPI document: bodies are read by handlers of our own, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel

from tokenmill.server.protocol_responses import ErrorResponse

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


class Operation(msgspec.Struct, frozen=True):
    """What a route with a handler of our own takes and gives."""

    path: str
    answer: type[BaseModel]
    body: type[BaseModel] | None = None
    streams: bool = False
    method: str = "post"


def document_operations(app: FastAPI, operations: Sequence[Operation]) -> None:
    """Give these routes their request and response schemas."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            _add_schema(schemas, ErrorResponse)
            for operation in operations:
                _add_schema(schemas, operation.answer)
                if operation.body is not None:
                    _add_schema(schemas, operation.body)
                    _allow_null(schemas[operation.body.__name__])
                document["paths"][operation.path][operation.method].update(_described(operation))
            _tidy(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _tidy(document: dict[str, Any]) -> None:
    """Errors as they are: 422 never comes, a name in a path may be unknown, a key may be missing."""
    error = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorResponse")}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            for status in ("401", "500", *(("404",) if "{" in path else ())):
                responses.setdefault(status, {"description": _ERRORS[status], "content": error})
            if path.startswith("/health"):
                responses.setdefault("503", {"description": "It doesn't serve."})
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _add_schema(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema


def _described(operation: Operation) -> dict[str, Any]:
    def content(model: type[BaseModel]) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}

    stream: dict[str, Any] = {"text/event-stream": {"schema": {}}} if operation.streams else {}
    answers = {"200": {"description": "The answer.", "content": content(operation.answer) | stream}}
    errors = {
        status: {"description": text, "content": content(ErrorResponse)} for status, text in _ERRORS.items()
    }
    described: dict[str, Any] = {"responses": answers | errors}
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": content(operation.body)}
    return described


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

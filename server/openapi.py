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
    "403": "The route needs an admin key.",
    "404": "Unknown model.",
    "409": "The model was unloaded before it was ready.",
    "413": "The body is too large.",
    "415": "The body isn't JSON.",
    "429": "The queue is full.",
    "500": "A fault of the server.",
    "503": "The model is loading or down, or the server is shutting down.",
    "504": "The request's deadline has passed.",
}


OF_ALL = ("401", "500")
OF_BODIES = ("400", "404", "413", "415", "429", "503", "504")


class Operation(msgspec.Struct, frozen=True):
    """What a route takes and gives."""

    path: str
    answer: type[BaseModel] | None
    """None: plain text."""
    body: type[BaseModel] | None = None
    streams: bool = False
    example: dict[str, Any] | None = None
    """A body that works as it is."""
    errors: tuple[str, ...] = OF_BODIES
    """Statuses of errors beside those that every route may answer with."""
    probe: bool = False
    """Whether 503 is an answer of the same shape, and no error."""
    posts: bool = False
    """Whether it is a `POST` though it takes no body."""

    @property
    def method(self) -> str:
        return "get" if self.body is None and not self.posts else "post"


def document_operations(app: FastAPI, operations: Sequence[Operation]) -> None:
    """Give these routes their request and response schemas."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            _add_schema(schemas, ErrorResponse)
            for operation in operations:
                if operation.answer is not None:
                    _add_schema(schemas, operation.answer)
                if operation.body is not None:
                    _add_schema(schemas, operation.body)
                    _allow_null(schemas[operation.body.__name__])
                document["paths"][operation.path][operation.method].update(_described(operation))
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            # A server without keys asks for none. The page of /docs has a place for the key because of this.
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_schema(schemas: dict[str, Any], model: type[BaseModel]) -> None:
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema


def _described(operation: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        answer = _content(operation.answer)
    if operation.streams:
        answer["text/event-stream"] = {"schema": {}}
    errors = {
        status: {"description": _ERRORS[status], "content": _content(ErrorResponse)}
        for status in sorted({*OF_ALL, *operation.errors})
    }
    responses = {"200": {"description": "The answer.", "content": answer}, **errors}
    if operation.probe:
        responses["503"] = {"description": "It doesn't serve.", "content": answer}
    described: dict[str, Any] = {"responses": responses}
    if operation.body is not None:
        content = _content(operation.body)
        if operation.example is not None:
            content["application/json"]["example"] = operation.example
        described["requestBody"] = {"required": True, "content": content}
    return described


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


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

"""Routes for who runs the server: load and unload a model."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from tokenmill.server.auth import KeyRing
from tokenmill.server.body import decode_object, read_body
from tokenmill.server.errors import bad_request, draining, shorten
from tokenmill.server.model import Model
from tokenmill.server.openapi import Operation
from tokenmill.server.plan import Variant
from tokenmill.server.probe_responses import ModelRow
from tokenmill.server.registry import Registry
from tokenmill.server.responses import json_response
from tokenmill.server.routes import ModelId

MAX_BODY = 1024
"""Bytes; some clients send an empty object with every POST."""
LOAD = "/v1/models/{model_id}/load"
UNLOAD = "/v1/models/{model_id}/unload"
LOAD_MEANING = (
    "Starts it and answers when it is loaded. Needs an admin key. Loading what is loaded does nothing. While its old "
    "process still finishes requests, it is loaded after that."
)
UNLOAD_MEANING = (
    "Takes no more requests for it, lets the running ones finish, ends its process and answers. Needs an admin key. "
    "What speaks its answers goes with it. A model with `load: lazy` is loaded again when a request asks for it; any "
    "other answers 503 `model_unloaded` until it is loaded by the route above."
)


def add_admin_routes(app: FastAPI, registry: Registry, keys: KeyRing) -> list[Operation]:
    """Add the routes; what they give. A deployment that shares its entry's engine stands for the entry."""

    async def admit(request: Request, model_id: str) -> tuple[Variant, Model]:
        keys.check_admin(request.scope)
        await _refuse_fields(request)
        if registry.draining:
            raise draining()
        return registry.find(model_id)

    async def load(request: Request, model_id: ModelId) -> Response:
        variant, model = await admit(request, model_id)
        await model.load()
        return json_response(registry.describe(variant))

    async def unload(request: Request, model_id: ModelId) -> Response:
        variant, model = await admit(request, model_id)
        await model.unload()
        if model.voice is not None:
            await model.voice.unload()
        return json_response(registry.describe(variant))

    for path, handler, verb, meaning in (
        (LOAD, load, "load", LOAD_MEANING),
        (UNLOAD, unload, "unload", UNLOAD_MEANING),
    ):
        app.add_api_route(
            # The path converter takes the longest id that leaves `/load` behind it.
            path.replace("model_id", "model_id:path"),
            handler,
            methods=["POST"],
            summary=f"{verb.capitalize()} a model",
            response_class=Response,
            operation_id=f"{verb}_model",
            description=meaning,
        )
    return [
        Operation(LOAD, ModelRow, errors=("400", "403", "404", "409", "413", "415", "503"), posts=True),
        Operation(UNLOAD, ModelRow, errors=("400", "403", "404", "413", "415", "503"), posts=True),
    ]


async def _refuse_fields(request: Request) -> None:
    """These routes take no body; an empty object will do. Raises `ApiError`."""
    headers = request.headers
    if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return
    fields = decode_object(await read_body(request.scope, request.receive, MAX_BODY))
    for name in fields:
        raise bad_request(f"this route takes no fields, not {shorten(name)}", name, "unknown_parameter")

"""The ASGI application: routes, their documentation, and the layer that shapes every error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tokenmill.server.admin import add_admin_routes
from tokenmill.server.api_docs import add_docs
from tokenmill.server.auth import KeyRing
from tokenmill.server.boundary import Boundary, http_error
from tokenmill.server.config import ServerConfig
from tokenmill.server.metrics import render
from tokenmill.server.openapi import Operation, document_operations
from tokenmill.server.playground_routes import add_playground
from tokenmill.server.probe_responses import (
    HealthResponse,
    LiveResponse,
    ModelHealthResponse,
    ModelList,
    ModelRow,
)
from tokenmill.server.registry import Registry
from tokenmill.server.responses import json_response
from tokenmill.server.routes import ModelId, add_model_routes
from tokenmill.server.version import VERSION

OPERATIONS = (
    Operation("/v1/models", ModelList, errors=()),
    Operation("/v1/models/{model_id}", ModelRow, errors=("404",)),
    Operation("/live", LiveResponse, errors=()),
    Operation("/health", HealthResponse, errors=(), probe=True),
    Operation("/health/{model_id}", ModelHealthResponse, errors=("404",), probe=True),
    Operation("/metrics", None, errors=()),
)
"""What the other routes give."""


def create_app(
    registry: Registry, config: ServerConfig, keys: Sequence[str] = (), admin_keys: Sequence[str] = ()
) -> FastAPI:
    """The application over a registry, which it starts and stops with itself."""
    ring = KeyRing(keys, admin_keys, config.admin_keys_env)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        registry.start()
        try:
            yield
        finally:
            await registry.stop()

    app = FastAPI(
        title="tokenmill",
        version=VERSION,
        description="A local inference server for open-weight models.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(Boundary, keys=ring)],
        exception_handlers={HTTPException: _on_http_error},
    )
    operations = [*add_model_routes(app, registry, config), *add_admin_routes(app, registry, ring)]
    _add_models(app, registry)
    _add_probes(app, registry)
    add_docs(app)
    add_playground(app)
    document_operations(app, [*operations, *OPERATIONS])
    return app


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = [route.path for route in request.app.routes if isinstance(route, Route) and "{" not in route.path]
    shaped = http_error(error, request.scope["path"], known)
    return Response(shaped.body(), shaped.status, shaped.headers, "application/json")


def _add_models(app: FastAPI, registry: Registry) -> None:
    @app.get("/v1/models", summary="List models", response_class=Response)
    async def list_models() -> Response:
        rows = [registry.describe(variant) for variant in registry.variants()]
        return json_response({"object": "list", "data": rows})

    @app.get("/v1/models/{model_id:path}", summary="Describe a model", response_class=Response)
    async def get_model(model_id: ModelId) -> Response:
        variant, _ = registry.find(model_id)
        return json_response(registry.describe(variant))


def _add_probes(app: FastAPI, registry: Registry) -> None:
    @app.head("/live", include_in_schema=False)
    @app.get("/live", summary="Whether the process runs", response_class=Response)
    async def live() -> Response:
        return json_response({"status": "ok"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether at least one model serves", response_class=Response)
    async def health() -> Response:
        serves, models = registry.health()
        return json_response(
            {"status": "ok" if serves else "unavailable", "models": models}, 200 if serves else 503
        )

    @app.head("/health/{model_id:path}", include_in_schema=False)
    @app.get("/health/{model_id:path}", summary="Whether one model serves", response_class=Response)
    async def model_health(model_id: ModelId) -> Response:
        variant, model = registry.find(model_id)
        serves = model.serves and not registry.draining
        row = {"status": "ok" if serves else "unavailable", "model": variant.name, "state": model.status}
        return json_response(
            row if model.reason is None else {**row, "reason": model.reason}, 200 if serves else 503
        )

    @app.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
    async def metrics() -> Response:
        return Response(render(registry.snapshots()), media_type="text/plain; version=0.0.4")

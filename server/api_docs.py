"""`GET /docs`: Swagger UI over the OpenAPI document, from files on this machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, Response

FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""FastAPI's page and Swagger UI hold scripts and styles of their own; nothing comes from elsewhere."""


def add_docs(app: FastAPI) -> None:
    """Add the page and the files that it needs."""
    folder = _folder()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=f"{app.title}: the API",
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="/docs/favicon.png",
        )
        page.headers["content-security-policy"] = POLICY
        return page

    for name, kind in FILES.items():
        app.add_api_route(f"/docs/{name}", _sender(folder / name, kind), include_in_schema=False)


def _folder() -> Path:
    """Where fastapi-offline keeps Swagger UI. Found without importing it: only its files are wanted."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise ImportError("the package fastapi-offline, which brings the page of /docs, isn't installed")
    return Path(spec.origin).parent / "static"


def _sender(path: Path, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(path, media_type=kind)

    return send

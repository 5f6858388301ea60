"""`GET /`: the playground page for a browser, a few lines of JSON for a program."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.responses import Response

from tokenmill.server.playground_files import FILES, FOLDER
from tokenmill.server.responses import json_response
from tokenmill.server.version import VERSION

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""What the page may do: run its own files and talk to this server, nothing else."""
ABOUT = {
    "name": "tokenmill",
    "version": VERSION,
    "links": {"models": "/v1/models", "health": "/health", "openapi": "/openapi.json", "docs": "/docs"},
}


def add_playground(app: FastAPI) -> None:
    """Add the page and its files, which are read once."""
    for path, (name, kind) in FILES.items():
        body = (FOLDER / name).read_bytes()
        send = _front(body) if path == "/" else _sender(body, kind)
        app.add_api_route(path, send, include_in_schema=False)


def _front(page: bytes) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            response = json_response(ABOUT)
        else:
            response = Response(page, media_type="text/html", headers=HEADERS)
        response.headers["vary"] = "accept"
        return response

    return send


def _sender(body: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return send

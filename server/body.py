"""The request body: read under a limit, decoded strictly. Everything wrong with it is an `ApiError`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope

from tokenmill.server.errors import ApiError, ClientGone, bad_request, shorten

SILENCE_S = 60.0
"""How long a body may stop coming; a client that never goes on would hold its connection for ever."""
_CLOSE = {"connection": "close"}


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """All of the body, `limit` bytes at the most: 413 past it, whatever Content-Length says; 415 for what isn't
    plain JSON; 400 where it stops coming. `ClientGone`."""
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    if not _is_json(content_type):
        given = f"not {shorten(content_type)}" if content_type else "which is missing"
        raise ApiError(
            415, f"the body must come with Content-Type: application/json, {given}", headers=_CLOSE
        )
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() != "identity":
        raise ApiError(
            415, f"the body must come without Content-Encoding, not in {shorten(encoding)}", headers=_CLOSE
        )
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await _next(receive)
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _next(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await receive()
    except TimeoutError:
        raise ApiError(400, f"the body stopped coming for {SILENCE_S:g} s", headers=_CLOSE) from None


def _is_json(content_type: str) -> bool:
    kind = content_type.split(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _too_large(limit: int) -> ApiError:
    # Closing saves reading the rest.
    return ApiError(
        413, f"the body is larger than {limit} bytes, which is all this server reads", headers=_CLOSE
    )


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body: UTF-8, finite numbers, whole characters; nulls ("not given") are dropped."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise bad_request(f"the body isn't valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {shorten(value)}")
    return without_nulls(value)


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its keys of value null."""
    return {key: item for key, item in value.items() if item is not None}

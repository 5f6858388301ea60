"""API keys: where they come from, and whether a request has one."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable

from starlette.types import Scope

from tokenmill.server.errors import ApiError

PUBLIC_PATHS = frozenset(["/live", "/health"])
"""Paths that need no key, compared to the ASGI scope's path as it is."""


def read_keys(variable: str | None) -> tuple[str, ...]:
    """The keys in an environment variable, separated by commas or white space; none where it isn't set."""
    value = os.environ.get(variable, "") if variable else ""
    return tuple(key for key in re.split(r"[,\s]+", value) if key)


class KeyRing:
    """Decides on access. Compares hashes, always all of them, so that time tells nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def check(self, scope: Scope) -> str:
        """The hash of the key that a request brought, or "" where no key is needed. Raises `ApiError` 401."""
        if not self._hashes or scope["path"] in PUBLIC_PATHS:
            return ""
        given = _given_key(scope)
        if given is None:
            raise _unauthorized(
                "no API key was given; send it as Authorization: Bearer KEY or x-api-key: KEY"
            )
        digest = _hash(given)
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(known, digest)
        if not found:
            raise _unauthorized("the API key is wrong")
        return digest


def _hash(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _given_key(scope: Scope) -> bytes | None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")


def _unauthorized(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)

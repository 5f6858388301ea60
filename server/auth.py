"""API keys: where they come from, whether a request has one, and whether it is an admin's."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable

from starlette.types import Scope

from tokenmill.server.errors import ApiError
from tokenmill.server.playground_files import FILES

DOCUMENTATION = frozenset(
    ["/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/favicon.png"]
)
PUBLIC_PATHS = frozenset(["/live", "/health", *DOCUMENTATION, *FILES])
"""Paths that need no key, compared to the ASGI scope's path as it is. A browser has no key to send before it
has the page that asks for one, and what the API looks like is no secret."""


def read_keys(variable: str | None) -> tuple[str, ...]:
    """The keys in an environment variable, separated by commas or white space; none where it isn't set."""
    value = os.environ.get(variable, "") if variable else ""
    return tuple(key for key in re.split(r"[,\s]+", value) if key)


class KeyRing:
    """Decides on access. Compares hashes, always all of them, so that time tells nothing about a key.

    An admin key opens what an ordinary key opens, and the routes that change what the server does; without
    admin keys nothing opens those. That holds for requests from the same machine too: any page in a browser
    there can send them.
    """

    def __init__(
        self, keys: Iterable[str], admin_keys: Iterable[str] = (), admin_keys_env: str | None = None
    ) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]
        self._admin_hashes = [_hash(key.encode()) for key in admin_keys]
        self._admin_keys_env = admin_keys_env

    def check(self, scope: Scope) -> str:
        """The hash of the key that a request brought, or "" where no key is needed. Raises `ApiError` 401."""
        if not self._hashes or scope["path"] in PUBLIC_PATHS:
            return ""
        digest = _given_hash(scope, "API")
        if not _among(digest, [*self._hashes, *self._admin_hashes]):
            raise _unauthorized("the API key is wrong")
        return digest

    def check_admin(self, scope: Scope) -> None:
        """Let only an admin key pass. Raises `ApiError`: 401, or 403 for an ordinary key and where no admin key
        is configured."""
        if not self._admin_hashes:
            name = self._admin_keys_env
            how = (
                f"set {name}" if name else "name an environment variable in server.admin_keys_env and set it"
            )
            message = f"this route needs an admin key, and the server has none; {how} and start it again"
            raise _forbidden(message, "admin_keys_not_configured")
        digest = _given_hash(scope, "admin")
        if _among(digest, self._admin_hashes):
            return
        if _among(digest, self._hashes):
            raise _forbidden("this route needs an admin key; an API key isn't enough", "admin_key_required")
        raise _unauthorized("the admin key is wrong")


def _hash(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _given_hash(scope: Scope, kind: str) -> str:
    given = _given_key(scope)
    if given is None:
        raise _unauthorized(
            f"no {kind} key was given; send it as Authorization: Bearer KEY or x-api-key: KEY"
        )
    return _hash(given)


def _among(digest: str, hashes: Iterable[str]) -> bool:
    found = False
    for known in hashes:
        found |= hmac.compare_digest(known, digest)
    return found


def _given_key(scope: Scope) -> bytes | None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token.strip():
        return token.strip()
    return headers.get(b"x-api-key")


def _unauthorized(message: str) -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)


def _forbidden(message: str, code: str) -> ApiError:
    return ApiError(403, message, kind="permission_error", code=code)

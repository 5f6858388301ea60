"""What the layers of the server know of one HTTP request: its ids, its key, what is logged of it."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

MAX_REQUEST_ID = 128


class RequestContext:
    """Made when a request arrives; handlers add to it, the boundary logs it."""

    def __init__(self, scope: Scope) -> None:
        self.arrival = time.monotonic()
        self.name = f"cmpl-{secrets.token_hex(16)}"
        """The server's own id of the request: in the answer and in the log."""
        self.api_key = ""
        """Hash of the key that it came with; empty where none is needed."""
        self.model: str | None = None
        self.user: str | None = None
        self.outcome: int | None = None
        self.usage: Mapping[str, Any] | None = None
        self.answering = False
        """Whether the response has begun."""
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope.get("headers", ())
        }

    @property
    def client_id(self) -> str | None:
        """The client's own id of the request: returned and logged, used for nothing else."""
        return self.headers.get("x-request-id")

    def add_headers(self, extra: Mapping[str, str]) -> None:
        """Headers that came in the body count as if sent."""
        self.headers.update({name.lower(): value for name, value in extra.items()})

    def response_headers(self) -> list[tuple[bytes, bytes]]:
        """`x-request-id`: the client's own where it sent one that a header can carry, else ours."""
        own = self.client_id
        usable = own is not None and 0 < len(own) <= MAX_REQUEST_ID and own.isascii() and own.isprintable()
        return [(b"x-request-id", (own if usable and own is not None else self.name).encode("ascii"))]

    def log_line(self, method: str, path: str, status: int) -> str:
        """One line for the access log: no prompt, no key, the user only hashed."""
        parts = [
            method,
            path,
            str(self.outcome or status),
            f"{(time.monotonic() - self.arrival) * 1000:.0f}ms",
            self.name,
        ]
        if self.client_id is not None:
            parts.append(f"client_id={self.client_id[:MAX_REQUEST_ID]!r}")
        if self.model is not None:
            parts.append(f"model={self.model}")
        if self.user is not None:
            parts.append(f"user={hashlib.sha256(self.user.encode()).hexdigest()[:12]}")
        if self.usage is not None:
            parts.append(f"tokens={self.usage['prompt_tokens']}+{self.usage['completion_tokens']}")
        return " ".join(parts)

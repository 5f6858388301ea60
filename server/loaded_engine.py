"""A loaded engine as the front end sees it: its socket, its tokenizer and what it said about itself."""

from __future__ import annotations

import asyncio

from tokenmill.engine.messages import Ready
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.chat_format import ChatFormat
from tokenmill.server.config import FimMarkup
from tokenmill.server.engine_client import EngineClient
from tokenmill.server.fim import Fim, make_fim


class Engine:
    """One engine, from its readiness to its end."""

    def __init__(self, client: EngineClient, ready: Ready) -> None:
        self.client = client
        self.ready = ready
        self.tokenizer = Tokenizer(ready.tokenizer)
        self._fims: dict[FimMarkup | str | bool, Fim | None] = {}
        self._chats: dict[tuple[str | None, str], ChatFormat] = {}
        self.requests = 0
        """Places that were given this engine and are held."""

    @property
    def context(self) -> int:
        """Tokens that one sequence may have: the model's limit, or all of the KV cache where that is less."""
        return min(self.ready.max_context, self.ready.num_blocks * self.ready.block_size)

    async def fim(self, wanted: FimMarkup | str | bool) -> Fim | None:
        """How the model fills in the middle, by an entry's `fim`; None where it can't."""
        if wanted not in self._fims:
            # The serialised tokenizer is megabytes of JSON.
            self._fims[wanted] = await asyncio.to_thread(make_fim, self.tokenizer, wanted)
        return self._fims[wanted]

    def chat(self, template: str | None, tool_parser: str) -> ChatFormat:
        """How the model chats, by an entry's `chat_template` (None: its own) and `tool_parser`. `ApiError`
        400 where it has no template."""
        wanted = (template, tool_parser)
        if wanted not in self._chats:
            self._chats[wanted] = ChatFormat(self.tokenizer, template, tool_parser)
        return self._chats[wanted]

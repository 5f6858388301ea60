"""One choice's text taken apart: thoughts, content and tool calls, for whole answers and for streams."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.server.reasoning import ReasoningParser
from tokenmill.server.tool_parser import CallPiece, Piece, ToolParser

ID_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ID_LENGTH = 24


def new_call_id() -> str:
    """An id for a tool call."""
    return "call_" + "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))


class Call(msgspec.Struct):
    """One tool call of an answer."""

    id: str
    name: str
    arguments: list[str]

    def body(self) -> dict[str, object]:
        """As OpenAI's clients read it."""
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class ChatText:
    """Reads one choice's text. `feed` and `finish` give the deltas of a stream, the rest is the message."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._thoughts: list[str] = []
        self._content: list[str] = []
        self.calls: list[Call] = []

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas that a piece of text brings."""
        thoughts, answer = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        return self._deltas(thoughts, self._pieces(answer))

    def finish(self, reason: str | None) -> list[dict[str, Any]]:
        """The deltas of what was held back, when the text has ended for this reason."""
        thoughts, answer = ("", "") if self._reasoning is None else self._reasoning.finish()
        pieces = self._pieces(answer)
        if self._tools is not None:
            pieces += self._tools.finish(cut=reason == "length")
        return self._deltas(thoughts, pieces)

    def _pieces(self, answer: str) -> list[Piece]:
        if not answer:
            return []
        return [answer] if self._tools is None else self._tools.feed(answer)

    def _deltas(self, thoughts: str, pieces: list[Piece]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if thoughts:
            self._thoughts.append(thoughts)
            deltas.append({"reasoning_content": thoughts})
        for piece in pieces:
            if isinstance(piece, str):
                self._content.append(piece)
                deltas.append({"content": piece})
            else:
                deltas.append({"tool_calls": [self._call(piece)]})
        return deltas

    def _call(self, piece: CallPiece) -> dict[str, object]:
        if piece.name is None:
            self.calls[piece.index].arguments.append(piece.arguments)
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        call = Call(new_call_id(), piece.name, [piece.arguments])
        self.calls.append(call)
        return {"index": piece.index, **call.body()}

    def message(self) -> dict[str, object]:
        """The assistant's message, once the text has ended."""
        content = "".join(self._content)
        message: dict[str, object] = {
            "role": "assistant",
            "content": content if content or not self.calls else None,
            "refusal": None,
        }
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        if self.calls:
            message["tool_calls"] = [call.body() for call in self.calls]
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """How the choice ended: a model that stopped behind a call waits for its result."""
        return "tool_calls" if reason == "stop" and self.calls else reason

    def reasoning_tokens(self, offsets: Sequence[int]) -> int:
        """Of the tokens that start at these characters, how many were thoughts and their tags."""
        if self._reasoning is None:
            return 0
        if self._reasoning.length is None:
            return len(offsets) if self._reasoning.thinking else 0
        return bisect_left(offsets, self._reasoning.length)

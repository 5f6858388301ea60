"""What a model thinks before it answers, between tags: kept apart from the answer as the text comes."""

from __future__ import annotations

import msgspec

from tokenmill.server.chat_markup import TrailingBlanks, cut


class Tags(msgspec.Struct, frozen=True):
    """What stands around a model's thoughts."""

    open: str
    close: str


PAIRS = (
    Tags("<think>", "</think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("<thinking>", "</thinking>"),
)


def find_tags(template: str) -> Tags | None:
    """The tags that a chat template knows of, by its text; None for a model that doesn't think aloud."""
    return next((tags for tags in PAIRS if tags.close in template), None)


def is_open(text: str, tags: Tags) -> bool:
    """Whether a text ends within thoughts, so that what follows begins there."""
    return text.rfind(tags.open) > text.rfind(tags.close)


class ReasoningParser:
    """Splits a text into thoughts and answer, whatever pieces it comes in.

    Thoughts stand at the beginning: `opened` where the prompt has their opening tag, otherwise behind one.
    Blanks around them are dropped.
    """

    def __init__(self, tags: Tags, opened: bool) -> None:
        self._tags = tags
        self._buffer = ""
        self._read = 0
        self._blanks = TrailingBlanks()
        self._blanks.drop()
        self._thinking = opened
        self._thought = opened
        """Whether there were thoughts."""
        self._answering = False
        self.length: int | None = None
        """Characters through the closing tag; None while that is to come."""

    @property
    def thinking(self) -> bool:
        """Whether what comes now are thoughts."""
        return self._thinking

    def feed(self, text: str) -> tuple[str, str]:
        """Thoughts and answer that this piece brings."""
        if self._answering:
            return "", text
        self._read += len(text)
        self._buffer += text
        if not (self._thinking or self._thought):
            self._begin()
        thoughts = self._think() if self._thinking else ""
        return thoughts, self._answer()

    def finish(self) -> tuple[str, str]:
        """No more text will come; what is left."""
        rest, self._buffer = self._buffer, ""
        if self._thinking:
            return self._blanks.feed(rest), ""
        return "", "" if self._thought else rest

    def _begin(self) -> None:
        """Before the first word: thoughts, if it is their tag."""
        start = self._buffer.lstrip()
        if start.startswith(self._tags.open):
            self._buffer = start[len(self._tags.open) :]
            self._thinking = self._thought = True
        elif not self._tags.open.startswith(start):
            self._answering = True
            self.length = 0

    def _think(self) -> str:
        text, marker, self._buffer = cut(self._buffer, [self._tags.close])
        if marker is not None:
            self._thinking = False
            self.length = self._read - len(self._buffer)
        return self._blanks.feed(text)

    def _answer(self) -> str:
        """The answer's first words; later ones need no look."""
        if self._thinking or not (self._thought or self._answering):
            return ""
        if self._thought:
            self._buffer = self._buffer.lstrip()
        self._answering = bool(self._buffer) or self._answering
        text, self._buffer = self._buffer, ""
        return text

"""Cuts a text into utterances: what a speech checkpoint is given at once. Imports no torch.

Sentences, or the parts of one that is too long. Where the cuts lie depends on the text alone, never on the pieces
in which it came, so a streamed answer sounds like its plain twin.
"""

from __future__ import annotations

import re

SHORTEST = 24
"""Characters below which a sentence is spoken together with the next one: "Dr. Smith" is no two sentences."""
LONGEST = 300
"""Characters of an utterance at the most: what speech checkpoints were trained on, and what memory is bounded by."""

_CLOSERS = "[\"'”’»)\\]」』）]*"
_SENTENCE = re.compile(rf"[.!?…]+{_CLOSERS}(?=\s)|[。！？]+{_CLOSERS}|\n")
_CLAUSE = re.compile(r"[,;:—–](?=\s)|[，、；：]")
_SPACE = re.compile(r"\s")


class Utterances:
    """The utterances of one text that comes piece by piece."""

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._longest = longest
        self._shortest = shortest
        self._rest = ""

    def push(self, text: str) -> list[str]:
        """The utterances that are complete with this piece."""
        self._rest += text
        return self._cut(last=False)

    def finish(self) -> list[str]:
        """What is left when the text has ended."""
        done = self._cut(last=True)
        self._rest = ""
        return done

    def _cut(self, last: bool) -> list[str]:
        done: list[str] = []
        while True:
            self._rest = self._rest.lstrip()
            end = self._end(last)
            if end is None:
                return done
            done.append(self._rest[:end].rstrip())
            self._rest = self._rest[end:]

    def _end(self, last: bool) -> int | None:
        """Where the next utterance ends; None while that can't be told, or when nothing is left."""
        window = self._rest[: self._longest + 1]
        for match in _SENTENCE.finditer(window, self._shortest):
            # At the window's end more marks or quotes may follow.
            if match.end() < len(window):
                return match.end()
        if len(window) > self._longest:
            return self._part(window[: self._longest])
        return len(window) if last and window else None

    def _part(self, text: str) -> int:
        """Where a sentence that is too long is cut: behind a clause, else between words, else anywhere."""
        for pattern in (_CLAUSE, _SPACE):
            ends = [match.end() for match in pattern.finditer(text, self._shortest)]
            if ends:
                return ends[-1]
        return len(text)

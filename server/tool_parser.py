"""Tool calls in a model's text, found as it comes: content on one side, calls on the other.

    text ──▶ content ──marker──▶ call ──end──▶ content | the next call
                 ▲                 │
                 └── it was none ──┘   (its text is content after all)

Whatever pieces the text comes in, the result is the same, and nothing of the markup is content. Blanks around
calls are dropped. Each form of markup is a parser of its own (`tool_markers.py`,
`tool_bare.py`); `tool_forms.py` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

import msgspec

from tokenmill.server.chat_markup import TrailingBlanks
from tokenmill.server.tool_json import CallScanner, Scanner


class CallPiece(msgspec.Struct, frozen=True):
    """News of one call: its name the first time, then more of its arguments."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallPiece
Functions = Mapping[str, Collection[str]]
"""The functions that there are: their names, and of each the parameters that are strings."""


class ToolParser(ABC):
    """What all forms share: the states, and what happens between content and calls.

    `functions` are those that there are. Past `limit` calls everything is dropped. `required`: the answer is
    nothing but calls, so what isn't one is the beginning of one.
    """

    def __init__(self, functions: Functions, limit: int | None = None, required: bool = False) -> None:
        self.functions = functions
        self.required = required
        self.calls = 0
        """Calls begun so far."""
        self._limit = limit
        self._buffer = ""
        self._raw: list[str] = []
        """The text of what may be a call, until it is one."""
        self._scanner: Scanner = CallScanner()
        self._announced = False
        self._blanks = TrailingBlanks()
        self._pieces: list[Piece] = []
        self._state: Callable[[], bool] = self._content
        """Reads from the buffer; False when it needs more text."""

    def feed(self, text: str) -> list[Piece]:
        """Read more text; what it brings."""
        self._buffer += text
        while self._state():
            pass
        return self._take()

    def finish(self, cut: bool = False) -> list[Piece]:
        """No more text will come, `cut`: because it was long enough; what is left."""
        self._at_end(cut)
        if not self.calls and (rest := self._blanks.flush()):
            self._pieces.append(rest)
        return self._take()

    @abstractmethod
    def _content(self) -> bool:
        """Look for the beginning of a call."""

    @abstractmethod
    def _after(self) -> bool:
        """Read what stands behind a call."""

    def _at_end(self, cut: bool) -> None:
        """The text has ended: what looked like the beginning of a marker was text; half a call is dropped."""
        if self._state == self._content and not self.required:
            self._say(self._buffer)
        self._buffer = ""

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _say(self, text: str) -> None:
        if shown := self._blanks.feed(text):
            self._pieces.append(shown)

    def _skip(self, characters: str) -> bool:
        """Drop these from the beginning of the buffer; whether anything else is there."""
        self._buffer = self._buffer.lstrip(characters)
        return bool(self._buffer)

    def _keep_blanks(self) -> None:
        """Blanks at the buffer's beginning belong to what may be a call."""
        rest = self._buffer.lstrip()
        self._raw.append(self._buffer[: len(self._buffer) - len(rest)])
        self._buffer = rest

    def _close(self, marker: str) -> bool:
        """Go back to content, past this marker where it stands there; False when more text must decide."""
        if marker.startswith(self._buffer) and self._buffer != marker:
            return False
        self._buffer = self._buffer.removeprefix(marker)
        self._state = self._content
        return True

    def _begin(self, scanner: Scanner) -> None:
        """A call may follow."""
        self._scanner = scanner
        self._announced = False
        self._state = self._scan

    def _scan(self) -> bool:
        taken = self._scanner.feed(self._buffer)
        if not self._scanner.started:
            self._raw.append(self._buffer[:taken])
        self._buffer = self._scanner.left + self._buffer[taken:]
        if self._scanner.failed:
            self._raw = ["".join(self._raw).removesuffix(self._scanner.left)]
            self._give_back()
            return True
        if self._scanner.started:
            self._report()
        if self._scanner.done:
            self._state = self._drop if self.calls == self._limit else self._after
        return self._scanner.done

    def _report(self) -> None:
        """Pass on what is new of the call."""
        arguments = self._scanner.take()
        if not self._announced:
            self._announced = True
            self._raw.clear()
            self._blanks.drop()
            self._pieces.append(CallPiece(self.calls, self._scanner.name, arguments))
            self.calls += 1
        elif arguments:
            self._pieces.append(CallPiece(self.calls - 1, None, arguments))

    def _give_back(self) -> None:
        """It was no call: its text is content."""
        self._say("".join(self._raw))
        self._raw.clear()
        self._state = self._content

    def _drop(self) -> bool:
        self._buffer = ""
        return False

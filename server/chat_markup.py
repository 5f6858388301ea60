"""Finding markers in a text that comes in pieces, so that nothing of a marker is ever taken for text."""

from __future__ import annotations

from collections.abc import Iterable


def partial(text: str, markers: Iterable[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a marker, not counting whole ones."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest


def cut(buffer: str, markers: Iterable[str]) -> tuple[str, str | None, str]:
    """What stands before the first marker, the marker (None where none is whole), and the rest.

    Without a marker the rest is what may become one. No marker may be the beginning of another.
    """
    found = [(place, marker) for marker in markers if (place := buffer.find(marker)) >= 0]
    if found:
        place, marker = min(found)
        return buffer[:place], marker, buffer[place + len(marker) :]
    end = len(buffer) - partial(buffer, markers)
    return buffer[:end], None, buffer[end:]


class TrailingBlanks:
    """Holds the blanks at the end of a text until it is known whether anything follows."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._skipping = False

    def feed(self, text: str) -> str:
        """The text without its trailing blanks, and with those that were held if more than blanks came."""
        if self._skipping:
            text = text.lstrip()
        solid = text.rstrip()
        if not solid:
            if text:
                self._held.append(text)
            return ""
        before = "".join(self._held)
        self._held = [text[len(solid) :]]
        self._skipping = False
        return before + solid

    def drop(self) -> None:
        """Forget the blanks that are held, and skip those that come next."""
        self._held = []
        self._skipping = True

    def flush(self) -> str:
        """The blanks that are held: the text ends with them."""
        held, self._held = "".join(self._held), []
        return held

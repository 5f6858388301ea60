"""Copies of what layers carry for a sequence, for requests to come that begin with the same tokens.

A block of the cache holds a token's keys and values whatever came after; a state has everything before it in one,
and is gone with the next token. So it is copied where a request to come might branch off: at the end of a prompt,
along an answer, and where a second request was seen to leave the text of a first. A copy lies in a line of its own
behind those of the running sequences, and is found under the name of the block that it follows (`block_pool.py`).

    free ──take──▶ being written ──keep──▶ known by name, oldest use first out
      ▲                 │ give_back             │ forget, or taken for another
      └─────────────────┴───────────────────────┘
"""

from __future__ import annotations

from collections import OrderedDict

from tokenmill.engine.block_pool import ContentName

LEAST = 128
"""Tokens that a copy has to spare a request to be worth the step that ends there."""


class Snapshots:
    """`count` lines from `first` on."""

    def __init__(self, first: int, count: int) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        self._line_of: OrderedDict[ContentName, int] = OrderedDict()
        self.lines = range(first, first + count)

    @property
    def known(self) -> int:
        """How many there are to be found."""
        return len(self._line_of)

    def find(self, name: ContentName) -> int | None:
        """The line whose state follows this content; it is used now."""
        line = self._line_of.get(name)
        if line is not None:
            self._line_of.move_to_end(name)
        return line

    def take(self) -> int | None:
        """A line to write to: a free one, else the one whose use is longest ago, else None."""
        if self._free:
            return self._free.pop()
        if not self._line_of:
            return None
        return self._line_of.popitem(last=False)[1]

    def keep(self, line: int, name: ContentName) -> None:
        """What a taken line holds is known by `name` now; where it was already, the line is free again."""
        if name in self._line_of:
            self.give_back(line)
        else:
            self._line_of[name] = line

    def give_back(self, line: int) -> None:
        """A taken line isn't needed."""
        self._free.append(line)

    def forget(self, name: ContentName) -> None:
        """What is known by `name` is of no more use."""
        line = self._line_of.pop(name, None)
        if line is not None:
            self._free.append(line)

    def reset(self) -> None:
        """Forget everything that is known."""
        for name in list(self._line_of):
            self.forget(name)

    def check_integrity(self, taken: list[int]) -> None:
        """Raise AssertionError unless each line is free, taken or known, and only that."""
        found = sorted([*self._free, *self._line_of.values(), *taken])
        assert found == list(self.lines), f"lines {found} are free, taken or known, of {self.lines}"

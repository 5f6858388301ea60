"""Incremental text of one choice: whole characters only, and nothing of a stop string ever.

    tokens ──stream──▶ whole characters ──StopMatcher──▶ released | held (may be the beginning of a stop)

Invariant: for any tokens, pushed in any portions, the concatenated pieces equal the text of all tokens
decoded at once, cut at the stop that is completed first (of those that one character completes, the longest).
A token costs O(1) amortised: the matcher reads each character once for each stop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from tokenmill.engine.tokenizer import Tokenizer, text_stream


class StopMatcher:
    """Finds the first of several strings to be completed in a text that comes in pieces.

    One Knuth-Morris-Pratt automaton a stop: its state is the length of the stop's longest prefix that ends
    the text so far, so the largest state is exactly how much of the text must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failure(stop)) for stop in stops]
        self._first = frozenset(stop[0] for stop in stops)
        self._states = [0] * len(stops)

    @property
    def partial(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop."""
        return max(self._states)

    def feed(self, text: str, counts: bool = True) -> tuple[int, int] | None:
        """Read a piece; (end in this piece, length) of the stop that it completes, if one does.

        A stop that is completed while `counts` is False is passed over.
        """
        if not any(self._states) and self._first.isdisjoint(text):
            return None
        for position, character in enumerate(text, 1):
            longest = self._step(character)
            if longest and counts:
                return position, longest
        return None

    def _step(self, character: str) -> int:
        """Advance each automaton; the length of the longest stop that this character completes, or 0."""
        longest = 0
        for i, (stop, failure) in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                longest = max(longest, state)
                state = failure[state - 1]
            self._states[i] = state
        return longest


def _failure(stop: str) -> list[int]:
    """For each prefix of a stop: the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[i] != stop[state]:
            state = table[state - 1]
        if stop[i] == stop[state]:
            state += 1
        table[i] = state
    return table


class Detokenizer:
    """Text of one choice from its token ids.

    `prompt_ids` is what the choice continues: it decides whether a leading space is text, and completes a
    character that the prompt left unfinished. A stop completed before token `min_tokens` doesn't count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._stream = text_stream(tokenizer, prompt_ids, skip_special_tokens)
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._pieces: list[str] = []
        self._held = ""
        self._decoded = 0
        self._released = 0
        self._finished = False
        self.offsets: list[int] = []
        """Where each token starts, in characters of the text."""
        self.stopped = False
        """Whether a stop string ended the text; what is pushed afterwards is ignored."""

    @property
    def text(self) -> str:
        """All text released so far; the whole answer once finished or stopped."""
        return "".join(self._pieces)

    @property
    def token_count(self) -> int:
        """Tokens of the answer: through the one that completed the stop, and the EOS or stop token."""
        return len(self.offsets)

    @property
    def settled(self) -> int:
        """Tokens that are sure to start before the end of the text, whatever comes; final at the end."""
        if not self.stopped and (self._finished or self._matcher is None or self._include_stop):
            return len(self.offsets)
        return bisect_left(self.offsets, self._released)

    def push(self, ids: Sequence[int], finished: bool = False, stop_token: int | None = None) -> str:
        """The text that these tokens release.

        `finished` when no more will come: everything held back is released. `stop_token` is the EOS or stop
        id that ended the generation, the last of `ids`; it has no text unless stops are included.
        """
        if self.stopped or self._finished:
            return ""
        before = len(self._pieces)
        silent = len(ids) - 1 if stop_token is not None and not self._include_stop else len(ids)
        for i, token in enumerate(ids):
            if i == silent:
                self._advance(self._stream.flush())
                if self.stopped:
                    break
            self.offsets.append(self._decoded)
            if i != silent:
                self._advance(self._stream.feed(token))
                if self.stopped:
                    break
        if finished and not self.stopped:
            self._advance(self._stream.flush())
            self._finished = True
            if not self.stopped:
                self._release(self._held)
        return "".join(self._pieces[before:])

    def _advance(self, text: str) -> None:
        """Take decoded characters: release what can't belong to a stop, hold the rest, or stop."""
        if not text:
            return
        self._decoded += len(text)
        if self._matcher is None:
            self._release(text)
            return
        match = self._matcher.feed(text, counts=len(self.offsets) >= self._min_tokens)
        if match is not None:
            end, length = match
            self.stopped = True
            whole = self._held + text[:end]
            self._release(whole if self._include_stop else whole[: len(whole) - length])
            return
        whole = self._held + text
        held = 0 if self._include_stop else self._matcher.partial
        self._held = whole[len(whole) - held :]
        self._release(whole[: len(whole) - held])

    def _release(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._released += len(text)

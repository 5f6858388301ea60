"""Drafts without a draft model: what came next the last time that the text looked like this.

Two sources. A client's prediction of the whole output: follow it, and when the output leaves it, look for the
place where it comes back. Or the request's own prompt and output, for text that repeats itself.

Drafting must pay for itself: a rejected draft costs a row of the step. So each request keeps the share of its
drafts that were accepted lately, drafts longer while it is high, and pauses for longer and longer while it is low.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 16
FIRST = 4
MATCH = 3
"""Tokens that must agree before a continuation is believed."""
SHORTEST_MATCH = 2
LONGEST_PAUSE = 64


class Proposer:
    """Drafts for one sequence.

    `prediction` is the expected output, if the client sent one; else the sequence's own `context` (its prompt;
    what is generated is learnt as it comes) is searched.
    """

    def __init__(self, prediction: Sequence[int] | None, context: Sequence[int]) -> None:
        self._predicted = prediction is not None
        self._source = list(context if prediction is None else prediction)
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0
        self._next = 0 if self._predicted else -1
        """Where in the source the next token is expected; -1: nowhere."""
        self._passed = self._next
        self._length = LONGEST if self._predicted else FIRST
        self._pause = 0
        self._next_pause = 1
        self._index()

    @property
    def ready(self) -> bool:
        """Whether it has something to propose once all tokens are known: worth leaving the overlap for."""
        return self._pause == 0 and 0 <= self._next < len(self._source)

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next; none while it doesn't pay."""
        if limit <= 0 or self._next < 0:
            return []
        if self._pause > 0:
            self._pause -= 1
            return []
        return self._source[self._next : self._next + min(limit, self._length)]

    def feedback(self, drafted: int, accepted: int) -> None:
        """How many of the last drafts were right."""
        if drafted == 0:
            return
        if accepted == drafted:
            self._length = min(LONGEST, max(self._length, drafted) * 2)
            self._next_pause = 1
        elif accepted == 0:
            self._length = max(1, self._length // 2)
            self._pause = self._next_pause
            self._next_pause = min(LONGEST_PAUSE, self._next_pause * 2)
        else:
            self._length = max(2, accepted + 1)
            self._next_pause = 1

    def extend(self, history: Sequence[int], new: int) -> None:
        """The last `new` tokens of `history` were generated; it reaches back at least MATCH tokens before them."""
        for token in history[len(history) - new :] if new else ():
            expected = self._next
            if 0 <= expected < len(self._source) and self._source[expected] == token:
                self._next = self._passed = expected + 1
            else:
                # The likeliest edit replaces one token: try the prediction's next one before giving up its place.
                self._next = expected + 1 if self._predicted and expected == self._passed >= 0 else -1
            if not self._predicted:
                self._source.append(token)
        self._index()
        if not 0 <= self._next < len(self._source) or self._next != self._passed:
            found = self._find(history)
            self._next = found if found >= 0 else self._next

    def _index(self) -> None:
        """Note where each run of tokens ends. A run at the very end of our own text has no continuation yet."""
        stop = len(self._source) if self._predicted else len(self._source) - 1
        for end in range(max(self._indexed, SHORTEST_MATCH), stop + 1):
            for size in (SHORTEST_MATCH, MATCH):
                if end >= size:
                    places = self._places.setdefault(tuple(self._source[end - size : end]), [])
                    if not self._predicted:
                        places.clear()
                    places.append(end)
        self._indexed = max(self._indexed, stop + 1)

    def _find(self, history: Sequence[int]) -> int:
        """Where in the source the text goes on after the end of `history`, -1 if it isn't there.

        The longest agreement wins; then the latest place of our own text, or in a prediction the first one that
        lies past what the output has reached.
        """
        for size in (MATCH, SHORTEST_MATCH):
            places = self._places.get(tuple(history[-size:])) if len(history) >= size else None
            if places:
                ahead = [place for place in places if place >= self._passed]
                place = ahead[0] if ahead else places[-1]
                return place if place < len(self._source) else -1
        return -1

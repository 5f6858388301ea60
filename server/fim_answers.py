"""Answers of the editors' routes: Mistral's chat-shaped one, llama.cpp's flat one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import msgspec

from tokenmill.server.answer import DONE
from tokenmill.server.generation import Choice, Generation

_encode = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


class FimAnswer:
    """Mistral's: a chat completion without a role to play."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._generation = generation
        self._head = {"id": generation.name, "created": int(time.time()), "model": model}
        self._begun = False

    def whole(self) -> bytes:
        """The JSON of a finished generation."""
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.take_text(), "tool_calls": None},
                "finish_reason": choice.finish_reason,
            }
            for choice in self._generation.returned()
        ]
        usage = self._generation.usage()
        return _encode({**self._head, "object": "chat.completion", "choices": choices, "usage": usage})

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """The text that is new, the usage with the last of it."""
        return b"".join([self._chunk(choice) for choice in choices])

    def _chunk(self, choice: Choice) -> bytes:
        text = choice.take_text()
        if not (text or choice.finish_reason):
            return b""
        delta = {"content": text} if self._begun else {"role": "assistant", "content": text}
        self._begun = True
        row = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [row]}
        return event({**chunk, "usage": self._generation.usage()} if choice.finish_reason else chunk)

    def end(self, with_done: bool) -> bytes:
        """The last event of a stream."""
        return DONE if with_done else b""


class LineRules:
    """Ends a choice where an editor's limits on lines say so. Set as a generation's `watch`."""

    def __init__(self, indent: int, limit_ms: int) -> None:
        self._indent = indent
        self._limit_s = limit_ms / 1000
        self._has_new_line = False
        self._blanks: int | None = None
        """What the current line begins with; None in the first line and behind a line's blanks."""

    def __call__(self, choice: Choice, text: str, now: float) -> None:
        kept = self._indented(text)
        if kept < len(text):
            choice.text = choice.text[: len(choice.text) - (len(text) - kept)]
            choice.finish_reason = "length"
        self._has_new_line |= "\n" in text
        if self._limit_s and self._has_new_line and now - choice.first > self._limit_s:
            choice.finish_reason = choice.finish_reason or "length"

    def _indented(self, text: str) -> int:
        """How much of the text comes before the first line that isn't indented enough."""
        for position, character in enumerate(text):
            if character == "\n":
                self._blanks = 0
            elif self._blanks is not None and character in " \t":
                self._blanks += 1
            elif self._blanks is not None:
                if self._blanks < self._indent:
                    return position
                self._blanks = None
        return len(text)


class InfillAnswer:
    """llama.cpp's."""

    def __init__(
        self, generation: Generation, model: str, arrival: float, tokens: bool, fields: Sequence[str]
    ) -> None:
        self._generation = generation
        self._model = model
        self._arrival = arrival
        self._tokens = tokens
        self._fields = fields
        self._sent = 0

    def whole(self) -> bytes:
        """The JSON of a finished generation."""
        (choice,) = self._generation.returned()
        return _encode(self._final(choice, choice.take_text(), choice.ids))

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """The text that is new; with the last of it, everything else."""
        return b"".join([self._chunk(choice) for choice in choices])

    def _chunk(self, choice: Choice) -> bytes:
        text = choice.take_text()
        if not (text or choice.finish_reason):
            return b""
        ids, self._sent = choice.ids[self._sent :], len(choice.ids)
        if choice.finish_reason is not None:
            return event(self._final(choice, text, ids))
        return event({**self._row(choice, text, ids), "stop": False})

    def end(self, with_done: bool) -> bytes:
        """llama.cpp's own streams just end."""
        return b""

    def _row(self, choice: Choice, text: str, ids: list[int]) -> dict[str, object]:
        return {
            "index": 0,
            "content": text,
            "tokens": ids if self._tokens else [],
            "id_slot": -1,
            "tokens_predicted": choice.detokenizer.token_count,
            "tokens_evaluated": len(choice.run.prompt.ids),
        }

    def _final(self, choice: Choice, text: str, ids: list[int]) -> dict[str, object]:
        stop_type, word = self._ending(choice)
        answer = {
            **self._row(choice, text, ids),
            "stop": True,
            "model": self._model,
            "tokens_cached": choice.run.cached_tokens,
            "truncated": False,
            "stop_type": stop_type,
            "stopping_word": word,
            "has_new_line": "\n" in choice.detokenizer.text,
            "timings": self._timings(choice),
        }
        return _select(answer, self._fields) if self._fields else answer

    def _ending(self, choice: Choice) -> tuple[str, str]:
        """Why the text ended, and the stop that ended it where only one was given."""
        if choice.finish_reason == "length":
            return "limit", ""
        if not choice.detokenizer.stopped:
            return "eos", ""
        stops = self._generation.job.params.stop
        return "word", stops[0] if len(stops) == 1 else ""

    def _timings(self, choice: Choice) -> dict[str, object]:
        evaluated = len(choice.run.prompt.ids) - choice.run.cached_tokens
        return {
            **_rate("prompt", evaluated, choice.first - self._arrival if choice.first else 0.0),
            **_rate("predicted", choice.detokenizer.token_count, choice.last - choice.first),
        }


def _rate(name: str, count: int, seconds: float) -> dict[str, object]:
    milliseconds = seconds * 1000
    return {
        f"{name}_n": count,
        f"{name}_ms": milliseconds,
        f"{name}_per_token_ms": milliseconds / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds > 0 else 0.0,
    }


def _select(answer: dict[str, object], fields: Sequence[str]) -> dict[str, object]:
    """Only these fields; one of an inner object keeps its whole path as its name."""
    chosen: dict[str, object] = {}
    for path in fields:
        value: object = answer
        for part in path.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen

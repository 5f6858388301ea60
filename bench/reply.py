"""One streamed answer as it comes in: when its tokens came, how many, and what went wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from tokenmill.bench.timeline import Timeline

DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


_event_decoder = msgspec.json.Decoder(_Event)


@dataclass(slots=True)
class Reply(Timeline):
    """What came back for one request."""

    ended: float = 0.0
    status: int = 0
    completion_tokens: int = 0
    """As the server counts them; without its count, the number of events."""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def per_token(self) -> float:
        """Mean seconds a token after the first one (TPOT)."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.completion_tokens - 1)

    def take_event(self, data: bytes, now: float) -> None:
        """Note one event of the stream, which came at `now`. Raises msgspec.MsgspecError for no event."""
        if data == DONE:
            return
        event = _event_decoder.decode(data)
        if event.error is not None:
            self.error = error_message(data)
        for choice in event.choices:
            if _carries_output(choice):
                self.arrivals.append(now)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if event.usage is not None:
            self.prompt_tokens, self.completion_tokens = (
                event.usage.prompt_tokens,
                event.usage.completion_tokens,
            )

    def close(self, body: bytes) -> None:
        """The answer is complete; `body` is what came beside events."""
        self.ended = time.perf_counter()
        if self.error is None and self.status != 200:
            self.error = f"status {self.status}: {error_message(body)}"
        self.completion_tokens = self.completion_tokens or len(self.arrivals)


def _carries_output(choice: _Choice) -> bool:
    """Whether an event brought a token; of a completion even one without text (part of a character) does."""
    if choice.delta is not None:
        return bool(choice.delta.content or choice.delta.reasoning_content)
    return choice.text is not None and (bool(choice.text) or choice.finish_reason is None)


def error_message(body: bytes) -> str:
    """The message in an answer of OpenAI's error shape, else the beginning of what came."""
    try:
        content = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        content = None
    if isinstance(content, dict):
        inner = content.get("error", content)
        message = inner.get("message") if isinstance(inner, dict) else inner
        if isinstance(message, str):
            return message
    return body[:200].decode("utf-8", "replace")

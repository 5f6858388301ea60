"""From a written answer to a spoken one, whatever its shape: chat, completion, completion with tools.

It works on what the writers of those have written, so that none of them knows of speech. A message's `content`
becomes the transcript of its `audio`; a completion's `text` stays, and gets `audio` beside it. In a stream, sound
comes as it is made, and a choice's finish reason waits for the end of its sound.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgspec

from tokenmill.server.generation import Choice, Generation
from tokenmill.server.speech import Clip, Speech

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

PIECE = 24_000
"""Bytes of sound in an event, half a second: some clients bound the length of a line. Divisible by 6."""
HEAD = ("id", "object", "created", "model", "system_fingerprint", "usage")

Row = dict[str, Any]


class EventWriter(Protocol):
    """What writes the events of an answer's text."""

    def chunks(self, choices: Iterable[Choice]) -> bytes: ...

    def end(self, with_done: bool) -> bytes: ...


async def spoken_whole(body: bytes, speech: Speech, generation: Generation) -> bytes:
    """The JSON of an answer with its choices spoken. Raises `ApiError` 400 for one that is too long."""
    answer = _decode(body)
    for row in answer["choices"]:
        text = row["message"]["content"] if "message" in row else row["text"]
        if text:
            speech.say(row["index"], text)
            speech.end(row["index"])
    await generation.finished()
    for row in answer["choices"]:
        clip = speech.clips.get(row["index"])
        holder = row.get("message", row)
        if clip is None:
            holder["audio"] = None
            continue
        transcript = holder["content"] if "message" in row else row["text"]
        holder["audio"] = {
            "id": clip.id,
            "data": base64.b64encode(clip.take()).decode(),
            "transcript": transcript,
            "expires_at": speech.expiry(),
        }
        if "message" in row:
            holder["content"] = None
    return _encode(answer)


class SpokenEvents:
    """Writes the events of a stream with text and sound."""

    def __init__(self, writer: EventWriter, speech: Speech) -> None:
        self._writer = writer
        self._speech = speech
        self._head: Row = {}
        """What the latest event began with."""
        self._chat: bool = False
        self._finishes: dict[int, Row] = {}
        """Events with the finish reasons of choices that are still being spoken."""
        self._named: set[int] = set()
        """Choices whose clip's id went out."""

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """Server-sent events with the news of these choices and of all clips."""
        written = self._writer.chunks(choices)
        events = [event for data in written.split(b"\n\n") if data for event in self._text(data)]
        events += [event for index in list(self._speech.clips) for event in self._sound(index)]
        return b"".join(b"data: %b\n\n" % _encode(event) for event in events)

    def end(self, with_done: bool) -> bytes:
        """The last events of the stream."""
        return self._writer.end(with_done)

    def _text(self, data: bytes) -> Iterator[Row]:
        """An event of the text, as it reads when the text is spoken, if it goes out now."""
        event = _decode(data.removeprefix(b"data: "))
        self._head = {key: event[key] for key in HEAD if key in event}
        (row,) = event["choices"]
        index, finish = row["index"], row["finish_reason"]
        self._chat = "delta" in row
        text = row["delta"].pop("content", None) if self._chat else row["text"]
        if self._chat and "role" in row["delta"]:
            row["delta"]["content"] = None
        if text:
            clip = self._speech.say(index, text)
            if self._chat:
                row["delta"]["audio"] = {**self._name(index, clip), "transcript": text}
        if finish is None or index not in self._speech.clips:
            yield event
            return
        self._speech.end(index)
        if text:
            row["finish_reason"] = None
            yield event
            event = self._event(index, None, finish)
        self._finishes[index] = event

    def _sound(self, index: int) -> Iterator[Row]:
        """The events of what has come of a clip; behind its end, the choice's own."""
        clip = self._speech.clips[index]
        data = clip.take()
        for start in range(0, len(data), PIECE):
            piece = base64.b64encode(data[start : start + PIECE]).decode()
            yield self._event(index, {**self._name(index, clip), "data": piece})
        if clip.ended and index in self._finishes:
            yield self._event(index, {"expires_at": self._speech.expiry()})
            yield self._finishes.pop(index)

    def _name(self, index: int, clip: Clip) -> Row:
        """The clip's id, once: clients that join deltas would join it, too."""
        first = index not in self._named
        self._named.add(index)
        return {"id": clip.id} if first else {}

    def _event(self, index: int, audio: Row | None, finish: str | None = None) -> Row:
        news: Row = {} if audio is None else {"audio": audio}
        content: Row = {"delta": news} if self._chat else {"text": "", **news}
        row = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return {**self._head, "choices": [row]}

"""The JSON of a tool call, read as it comes: its name as soon as it is whole, its arguments piece by piece.

Models write what they like. A call that can't be read before its name is known has `failed`: its text was no
call. One that breaks off later keeps the arguments that came, as the model left them.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection

CLOSING = {"{": "}", "[": "]"}
NAMES = frozenset(["name"])
ARGUMENTS = frozenset(["arguments", "parameters"])
KNOWN_KEYS = NAMES | ARGUMENTS | {"type", "id", "function"}
FUNCTION_NAME = re.compile(r"[\w.:/-]{1,128}")

_PLAIN = re.compile(r"[\s:,\w+.-]*")
_IN_STRING = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[\w+.-]*")


class ValueScanner:
    """Finds the end of one JSON value: balanced brackets and strings; its tokens aren't checked further."""

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        """Whether something came that no JSON value can hold there."""
        self._closing: list[str] = []
        self._quoted = False
        self._escaped = False
        self._scalar = False

    def feed(self, text: str, start: int = 0) -> int:
        """Read from `start`; where the value ends in this text, or its length. Blanks before it count."""
        position = start
        while position < len(text) and not (self.done or self.broken):
            position = self._in_string(text, position) if self._quoted else self._outside(text, position)
        return position

    def _in_string(self, text: str, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        match = _IN_STRING.match(text, position)
        assert match is not None
        position = match.end()
        if position == len(text):
            return position
        self._escaped = text[position] == "\\"
        if text[position] == '"':
            self._quoted = False
            self.done = not self._closing
        return position + 1

    def _outside(self, text: str, position: int) -> int:
        if not self._closing:
            return self._begin(text, position)
        match = _PLAIN.match(text, position)
        assert match is not None
        position = match.end()
        if position == len(text):
            return position
        character = text[position]
        if character == '"':
            self._quoted = True
        elif character in CLOSING:
            self._closing.append(CLOSING[character])
        elif character == self._closing[-1]:
            self._closing.pop()
            self.done = not self._closing
        else:
            self.broken = True
            return position
        return position + 1

    def _begin(self, text: str, position: int) -> int:
        """Before the first character of the value, or within a number or word."""
        if self._scalar:
            match = _SCALAR.match(text, position)
            assert match is not None
            self.done = match.end() < len(text)
            return match.end()
        character = text[position]
        if character.isspace():
            return position + 1
        if character == '"':
            self._quoted = True
        elif character in CLOSING:
            self._closing.append(CLOSING[character])
        elif character.isalnum() or character == "-":
            self._scalar = True
        else:
            self.broken = True
            return position
        return position + 1


class Scanner(ABC):
    """Reads one call."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.started = False
        """Whether it is sure to be a call: its name is known and its arguments have begun."""
        self.done = self.failed = False
        self.left = ""
        """What was read and stands behind the call's end, or behind what showed that it was none."""
        self._arguments: list[str] = []

    @property
    def promising(self) -> bool:
        """Whether what was read is more than any text that begins alike: the beginning of a call."""
        return not self.failed

    @abstractmethod
    def feed(self, text: str) -> int:
        """Read; how many characters were read."""

    def take(self) -> str:
        """Arguments that nobody has taken yet. Only once `started`."""
        pieces, self._arguments = self._arguments, []
        return "".join(pieces)


class ArgumentsScanner(Scanner):
    """The arguments of a call whose name came before them: one JSON object."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._value = ValueScanner()

    def feed(self, text: str) -> int:
        start = 0
        if not self.started:
            start = len(text) - len(text.lstrip())
            if start == len(text):
                return start
            if text[start] != "{":
                self.failed = True
                return 0
            self.started = True
        end = self._value.feed(text, start)
        self._arguments.append(text[start:end])
        self.done = self._value.done or self._value.broken
        return end


class CallScanner(Scanner):
    """A call as an object: `{"name": …, "arguments": {…}}`, with `parameters` for `arguments` in some models,
    in any order, and perhaps inside `"function": {…}`.

    `names` are the functions that there are, where only they make an object a call; else any name does.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__()
        self._names = names
        self._level = 0
        self._expects = "object"
        self._key = ""
        self._value = ValueScanner()
        self._raw: list[str] = []
        """The key or value that is being read."""
        self._given = False
        """Whether arguments were there at all."""

    @property
    def promising(self) -> bool:
        if self.failed or self._key not in KNOWN_KEYS:
            return False
        if self._names is None or self._key not in NAMES or self._expects != "value":
            return True
        begun = "".join(self._raw)
        return any(json.dumps(name).startswith(begun) for name in self._names)

    def feed(self, text: str) -> int:
        position = 0
        while position < len(text) and not (self.done or self.failed):
            if self._expects in ("key", "value"):
                position = self._read(text, position)
            elif text[position].isspace():
                position += 1
            else:
                position += self._punctuation(text[position])
        return position

    def _read(self, text: str, position: int) -> int:
        end = self._value.feed(text, position)
        piece = text[position:end]
        if self._expects == "value" and self._streams(piece):
            self._arguments.append(piece)
            self._start()
        else:
            self._raw.append(piece)
        if self._value.broken:
            self._break()
        elif self._value.done:
            if self._expects == "key":
                self._end_key()
            else:
                self._end_value()
        return end

    def _streams(self, piece: str) -> bool:
        """Whether this value is arguments that can be passed on as they come."""
        if self._key not in ARGUMENTS:
            return False
        if not self._given and not self._raw and piece.startswith("{"):
            self._given = True
        return self._given and not self._raw

    def _punctuation(self, character: str) -> int:
        """One character between keys and values; 1 where it was read, 0 where it is left."""
        match self._expects, character:
            case ("object", "{"):
                self._level, self._expects = 1, "first key"
            case ("first key" | "next key", '"'):
                self._begin("key")
                return 0
            case ("colon", ":"):
                self._expects = "any value"
            case ("any value", "{") if self._key == "function":
                self._level += 1
                self._expects = "first key"
            case ("any value", _):
                self._begin("value")
                return 0
            case ("comma", ","):
                self._expects = "next key"
            case ("comma" | "first key", "}"):
                self._close()
            case _:
                self._break()
                return 0
        return 1

    def _begin(self, what: str) -> None:
        self._expects, self._value, self._raw = what, ValueScanner(), []

    def _end_key(self) -> None:
        self._key = _text("".join(self._raw)) or ""
        self._raw = []
        self._expects = "colon"
        if self._names is not None and not self.started and self._key not in KNOWN_KEYS:
            self.failed = True

    def _end_value(self) -> None:
        value = "".join(self._raw)
        self._raw = []
        self._expects = "comma"
        if self._key in ARGUMENTS:
            if not self._given:
                self._given = True
                self._arguments.append(_arguments(value))
            self._start()
        elif (self._key in NAMES or self._key == "function") and self.name is None:
            self.name = _text(value)
            if (
                self.name is None
                or not FUNCTION_NAME.fullmatch(self.name)
                or (self._names is not None and self.name not in self._names)
            ):
                self.failed = True
            elif self._given:
                self._start()

    def _start(self) -> None:
        self.started = self.started or self.name is not None

    def _close(self) -> None:
        self._level -= 1
        self._expects = "comma"
        if self._level:
            return
        if self.name is None or (self._names is not None and not self._given):
            self.failed = True
            return
        if not self._given:
            self._arguments.append("{}")
        self.started = self.done = True

    def _break(self) -> None:
        if self.started:
            self.done = True
        else:
            self.failed = True


def _text(value: str) -> str | None:
    """The string that a JSON value is, or None."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, str) else None


def _arguments(value: str) -> str:
    """Arguments that aren't written as an object: some models put its JSON into a string, or say null."""
    return (_text(value) or value) if value.strip() != "null" else "{}"

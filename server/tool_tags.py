"""Calls in tags, read as they come: as later Qwen models write them, and as GLM-4.5 and its successors do.

    <function=NAME>                      NAME
    <parameter=KEY>                      <arg_key>KEY</arg_key>
    VALUE                                <arg_value>VALUE</arg_value>
    </parameter>
    </function>

A value is text where the function's schema says string; any other is JSON. The arguments, an object, grow by
one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from tokenmill.server.chat_markup import cut
from tokenmill.server.tool_json import FUNCTION_NAME, Scanner

FUNCTION = "<function="
FUNCTION_END = "</function>"
PARAMETER = "<parameter="
PARAMETER_END = "</parameter>"
ARGUMENT = "<arg_key>"
ARGUMENT_END = "</arg_key>"
VALUE = "<arg_value>"
VALUE_END = "</arg_value>"
PAIR_TAGS = (ARGUMENT, ARGUMENT_END, VALUE, VALUE_END)
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class TagScanner(Scanner):
    """Reads one call. `functions`: of each function the parameters that are strings."""

    def __init__(self, functions: Mapping[str, Collection[str]]) -> None:
        super().__init__()
        self._functions = functions
        self._buffer = ""
        self._key: str | None = None
        self._empty = True

    def feed(self, text: str) -> int:
        self._buffer += text
        while not (self.done or self.failed) and self._advance():
            pass
        if self.done or self.failed:
            self.left, self._buffer = self._buffer, ""
        return len(text)

    def _advance(self) -> bool:
        """Read one tag or value; False when more text is needed."""
        if self._key is not None:
            return self._read_value(self._key)
        self._buffer = self._buffer.lstrip()
        for tag in (PARAMETER, FUNCTION_END) if self.started else (FUNCTION,):
            if self._buffer.startswith(tag):
                return self._read_tag(tag)
            if tag.startswith(self._buffer):
                return False
        if self.started:
            self._end()
        else:
            self.failed = True
        return True

    def _read_tag(self, tag: str) -> bool:
        rest = self._buffer[len(tag) :]
        if tag == FUNCTION_END:
            self._buffer = rest
            self._end()
            return True
        name, marker, behind = cut(rest, [">", "\n"])
        if marker is None:
            return False
        self._buffer = behind
        if tag == PARAMETER:
            self._key = name.strip()
        elif marker == ">" and FUNCTION_NAME.fullmatch(name.strip()):
            self.name = name.strip()
            self.started = True
        else:
            self.failed = True
        return True

    def _read_value(self, key: str) -> bool:
        value, marker, behind = cut(self._buffer, [PARAMETER_END])
        if marker is None:
            return False
        self._buffer = behind
        self._add(key, value.removeprefix("\n").removesuffix("\n"))
        return True

    def _add(self, key: str, value: str) -> None:
        """One argument more."""
        self._key = None
        opening = "{" if self._empty else ", "
        self._empty = False
        self._arguments.append(f"{opening}{_text(key)}: {self._written(key, value)}")

    def _written(self, key: str, value: str) -> str:
        """The JSON of a value."""
        if key in self._functions.get(self.name or "", ()):
            return _text(value)
        plain = value.strip()
        try:
            parsed = msgspec.json.decode(_PYTHON.get(plain, plain))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return _text(value)
        return msgspec.json.encode(parsed).decode()

    def _end(self) -> None:
        self._arguments.append("{}" if self._empty else "}")
        self.done = True


class PairScanner(TagScanner):
    """Reads one call of GLM's: the name of a function that there is, then pairs of keys and values."""

    def _advance(self) -> bool:
        if not self.started:
            return self._read_name()
        self._buffer = self._buffer.lstrip()
        tag = ARGUMENT if self._key is None else VALUE
        if self._buffer.startswith(tag):
            return self._read_pair(tag)
        if tag.startswith(self._buffer):
            return False
        self._end()
        return True

    def _read_name(self) -> bool:
        name, marker, _ = cut(self._buffer, ["\n", "<"])
        if marker is None:
            return False
        if name.strip() in self._functions:
            self.name, self.started = name.strip(), True
            self._buffer = self._buffer[len(name) :]
        else:
            self.failed = True
        return True

    def _read_pair(self, tag: str) -> bool:
        """A key, or the value behind it."""
        closing = ARGUMENT_END if tag == ARGUMENT else VALUE_END
        inner, marker, behind = cut(self._buffer[len(tag) :], [closing])
        if marker is None:
            return False
        self._buffer = behind
        if self._key is None:
            self._key = inner.strip()
        else:
            self._add(self._key, inner)
        return True


def _text(value: str) -> str:
    return msgspec.json.encode(value).decode()

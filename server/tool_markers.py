"""Tool calls that stand behind markers: Hermes and Qwen, Mistral, DeepSeek."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from tokenmill.server.chat_markup import cut
from tokenmill.server.tool_json import FUNCTION_NAME, ArgumentsScanner, CallScanner
from tokenmill.server.tool_parser import ToolParser
from tokenmill.server.tool_tags import FUNCTION, PairScanner, TagScanner


class MarkedParser(ToolParser):
    """Calls that begin with one marker."""

    OPEN: ClassVar[str]

    def _content(self) -> bool:
        text, marker, self._buffer = cut(self._buffer, [self.OPEN])
        self._say(text)
        if marker is None:
            return False
        self._raw.append(marker)
        self._state = self._form
        return True

    @abstractmethod
    def _form(self) -> bool:
        """Reads what stands behind the marker; False when it needs more text."""


class HermesParser(MarkedParser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, one pair of tags a call: Hermes, Qwen, others.

    Inside, later Qwen models and GLM write tags of their own instead of JSON; any of them is read.
    """

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"

    def _form(self) -> bool:
        """Behind the tag: JSON, or another tag."""
        self._keep_blanks()
        if FUNCTION.startswith(self._buffer) and self._buffer != FUNCTION:
            return False
        if self._buffer.startswith(FUNCTION):
            self._begin(TagScanner(self.functions))
        else:
            named = FUNCTION_NAME.match(self._buffer) is not None
            self._begin(PairScanner(self.functions) if named else CallScanner())
        return True

    def _after(self) -> bool:
        # A brace too many is a slip that small models make.
        if not self._skip(" \t\r\n}"):
            return False
        return self._close(self.CLOSE)


class MistralParser(MarkedParser):
    """`[TOOL_CALLS]` before a JSON list of calls, or before each `name[ARGS]{…}` (newer models)."""

    OPEN = "[TOOL_CALLS]"
    IDENTIFIER = "[CALL_ID]"
    ARGUMENTS = "[ARGS]"
    _listed = False

    def _form(self) -> bool:
        """Behind the marker: a list, or a name."""
        if not self._skip(" \t\r\n"):
            return False
        self._listed = self._buffer[0] == "["
        if self._listed:
            self._raw.append("[")
            self._buffer = self._buffer[1:]
        if self._listed or self._buffer[:1] == "{":
            self._begin(CallScanner())
        else:
            self._state = self._head
        return True

    def _head(self) -> bool:
        """The name, and with some models the call's id, up to the arguments."""
        head, marker, rest = cut(self._buffer, [self.ARGUMENTS, "{", "\n", " "])
        if marker is None:
            return False
        name = head.split(self.IDENTIFIER)[0]
        self._raw.append(head)
        if marker == self.ARGUMENTS:
            self._raw.append(marker)
        else:
            rest = marker + rest
        self._buffer = rest
        if FUNCTION_NAME.fullmatch(name):
            self._begin(ArgumentsScanner(name))
        else:
            self._give_back()
        return True

    def _after(self) -> bool:
        if not self._listed:
            self._state = self._content
            return True
        if not self._skip(" \t\r\n"):
            return False
        following = self._buffer[0]
        if following in ",]":
            self._buffer = self._buffer[1:]
        if following == ",":
            self._begin(CallScanner())
        else:
            self._state = self._content
        return True


class DeepSeekParser(ToolParser):
    """DeepSeek's markers around each call: `name⟨sep⟩{…}`, or `function⟨sep⟩name` and a fenced block."""

    ALL = "<｜tool▁calls▁begin｜>"
    ALL_END = "<｜tool▁calls▁end｜>"
    OPEN = "<｜tool▁call▁begin｜>"
    SEPARATOR = "<｜tool▁sep｜>"
    CLOSE = "<｜tool▁call▁end｜>"
    _kind = ""

    def _content(self) -> bool:
        text, marker, self._buffer = cut(self._buffer, [self.ALL, self.ALL_END, self.OPEN])
        self._say(text)
        if marker == self.OPEN:
            self._raw.append(marker)
            self._state = self._head
        return marker is not None

    def _head(self) -> bool:
        head, marker, rest = cut(self._buffer, [self.SEPARATOR])
        if marker is None:
            return False
        self._raw += [head, marker]
        self._kind, self._buffer = head.strip(), rest
        self._state = self._body
        return True

    def _body(self) -> bool:
        """Behind the separator: the arguments, or name and fence before them."""
        head, marker, rest = cut(self._buffer, ["{"])
        if marker is None:
            return False
        self._raw.append(head)
        self._buffer = marker + rest
        name = head.strip().split("\n")[0].strip() or self._kind
        if FUNCTION_NAME.fullmatch(name):
            self._begin(ArgumentsScanner(name))
        else:
            self._give_back()
        return True

    def _after(self) -> bool:
        if not self._skip(" \t\r\n`"):
            return False
        return self._close(self.CLOSE)

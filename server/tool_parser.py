"""Tool calls in a model's text, found as it comes: content on one side, calls on the other.

    text ──▶ content ──marker──▶ call ──end──▶ content | the next call
                 ▲                 │
                 └── it was none ──┘   (its text is content after all)

Whatever pieces the text comes in, the result is the same, and nothing of the markup is content. Blanks around
calls are dropped. Each form of markup is a parser of its own; `tool_forms.py` chooses.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from tokenmill.server.chat_markup import TrailingBlanks, cut, partial
from tokenmill.server.tool_json import FUNCTION_NAME, ArgumentsScanner, CallScanner, Scanner


class CallPiece(msgspec.Struct, frozen=True):
    """News of one call: its name the first time, then more of its arguments."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallPiece


class ToolParser:
    """What all forms share: the states, and what happens between content and calls.

    `names` are the functions that there are. Past `limit` calls everything is dropped.
    """

    def __init__(self, names: frozenset[str], limit: int | None = None) -> None:
        self.names = names
        self.calls = 0
        """Calls begun so far."""
        self._limit = limit
        self._buffer = ""
        self._raw: list[str] = []
        """The text of what may be a call, until it is one."""
        self._scanner: Scanner = CallScanner()
        self._announced = False
        self._blanks = TrailingBlanks()
        self._pieces: list[Piece] = []
        self._state: Callable[[], bool] = self._content
        """Reads from the buffer; False when it needs more text."""

    def feed(self, text: str) -> list[Piece]:
        """Read more text; what it brings."""
        self._buffer += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """No more text will come; what is left."""
        self._at_end()
        if not self.calls and (rest := self._blanks.flush()):
            self._pieces.append(rest)
        return self._take()

    def _content(self) -> bool:
        """Look for the beginning of a call."""
        raise NotImplementedError

    def _after(self) -> bool:
        """Read what stands behind a call."""
        raise NotImplementedError

    def _at_end(self) -> None:
        """The text has ended: what looked like the beginning of a marker was text; half a call is dropped."""
        if self._state == self._content:
            self._say(self._buffer)
        self._buffer = ""

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _say(self, text: str) -> None:
        if shown := self._blanks.feed(text):
            self._pieces.append(shown)

    def _skip(self, characters: str) -> bool:
        """Drop these from the beginning of the buffer; whether anything else is there."""
        self._buffer = self._buffer.lstrip(characters)
        return bool(self._buffer)

    def _accept(self, marker: str) -> bool | None:
        """Take a marker off the buffer's beginning; None when more text must decide."""
        if self._buffer.startswith(marker):
            self._buffer = self._buffer[len(marker) :]
            return True
        return None if marker.startswith(self._buffer) else False

    def _begin(self, scanner: Scanner) -> None:
        """A call may follow."""
        self._scanner = scanner
        self._announced = False
        self._state = self._scan

    def _scan(self) -> bool:
        taken = self._scanner.feed(self._buffer)
        if not self._scanner.started:
            self._raw.append(self._buffer[:taken])
        self._buffer = self._buffer[taken:]
        if self._scanner.failed:
            self._give_back()
            return True
        if self._scanner.started:
            self._report()
        if self._scanner.done:
            self._state = self._drop if self.calls == self._limit else self._after
        return self._scanner.done

    def _report(self) -> None:
        """Pass on what is new of the call."""
        arguments = self._scanner.take()
        if not self._announced:
            self._announced = True
            self._raw.clear()
            self._blanks.drop()
            self._pieces.append(CallPiece(self.calls, self._scanner.name, arguments))
            self.calls += 1
        elif arguments:
            self._pieces.append(CallPiece(self.calls - 1, None, arguments))

    def _give_back(self) -> None:
        """It was no call: its text is content."""
        self._say("".join(self._raw))
        self._raw.clear()
        self._state = self._content

    def _drop(self) -> bool:
        self._buffer = ""
        return False


class HermesParser(ToolParser):
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, one pair of tags a call: Hermes, Qwen, others."""

    OPEN = "<tool_call>"
    CLOSE = "</tool_call>"

    def _content(self) -> bool:
        text, marker, self._buffer = cut(self._buffer, [self.OPEN])
        self._say(text)
        if marker is None:
            return False
        self._raw.append(marker)
        self._begin(CallScanner())
        return True

    def _after(self) -> bool:
        # A brace too many is a slip that small models make.
        if not self._skip(" \t\r\n}"):
            return False
        closed = self._accept(self.CLOSE)
        if closed is not None:
            self._state = self._content
        return closed is not None


class MistralParser(ToolParser):
    """`[TOOL_CALLS]` before a JSON list of calls, or before each `name[ARGS]{…}` (newer models)."""

    OPEN = "[TOOL_CALLS]"
    IDENTIFIER = "[CALL_ID]"
    ARGUMENTS = "[ARGS]"

    def __init__(self, names: frozenset[str], limit: int | None = None) -> None:
        super().__init__(names, limit)
        self._listed = False

    def _content(self) -> bool:
        text, marker, self._buffer = cut(self._buffer, [self.OPEN])
        self._say(text)
        if marker is None:
            return False
        self._raw.append(marker)
        self._state = self._form
        return True

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

    def __init__(self, names: frozenset[str], limit: int | None = None) -> None:
        super().__init__(names, limit)
        self._kind = ""

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
        closed = self._accept(self.CLOSE)
        if closed is not None:
            self._state = self._content
        return closed is not None


class BareParser(ToolParser):
    """Calls as JSON objects at the beginning of a line, alone, in a list or in a fenced block.

    Only an object with the name of a function that there is, and with arguments, is a call: other JSON is
    content. Behind Llama 3's `<|python_tag|>` any name is.
    """

    TAG = "<|python_tag|>"
    _TRIGGER = re.compile(r"<\|python_tag\|>|(?m:^)[ \t]*(?P<json>```|[{\[])")
    _HALF_FENCE = re.compile(r"(?m:^)[ \t]*(`{1,2})\Z")

    def __init__(self, names: frozenset[str], limit: int | None = None) -> None:
        super().__init__(names, limit)
        self._line_begins = True
        self._listed = self._fenced = self._tagged = False

    def _content(self) -> bool:
        # A letter stands for what the line has already.
        before = "" if self._line_begins else "x"
        probe = before + self._buffer
        match = self._TRIGGER.search(probe)
        if match is None:
            half = self._HALF_FENCE.search(probe)
            end = half.start(1) if half else len(probe) - partial(self._buffer, [self.TAG])
            self._buffer = probe[end:]
            self._tell(probe[len(before) : end])
            return False
        start = match.start() if match["json"] is None else match.start("json")
        self._buffer = probe[match.end() :]
        self._tell(probe[len(before) : start])
        self._listed = self._fenced = False
        self._tagged = match["json"] is None
        if self._tagged:
            self._state = self._behind_tag
        elif match["json"] == "```":
            self._raw.append("```")
            self._state = self._fence
        else:
            self._open(match["json"])
        return True

    def _tell(self, text: str) -> None:
        line = text.rpartition("\n")
        if line[1]:
            self._line_begins = True
        self._line_begins = self._line_begins and not line[2].strip()
        self._say(text)

    def _give_back(self) -> None:
        raw = "".join(self._raw)
        self._raw.clear()
        self._tell(raw)
        self._state = self._content

    def _behind_tag(self) -> bool:
        """JSON behind the tag is a call; anything else (code) is content, without the tag."""
        if not self._skip(" \t\r\n"):
            return False
        if self._buffer[0] in "{[":
            opening, self._buffer = self._buffer[0], self._buffer[1:]
            self._open(opening)
        else:
            self._state = self._content
        return True

    def _fence(self) -> bool:
        """Behind the backticks: the block's language."""
        language, marker, rest = cut(self._buffer, ["\n"])
        if marker is None:
            return False
        self._raw += [language, marker]
        self._buffer = rest
        if language.strip() in ("", "json"):
            self._fenced = True
            self._state = self._block
        else:
            self._give_back()
        return True

    def _block(self) -> bool:
        """The first thing in a fenced block."""
        blanks = len(self._buffer) - len(self._buffer.lstrip())
        self._raw.append(self._buffer[:blanks])
        self._buffer = self._buffer[blanks:]
        if not self._buffer:
            return False
        if self._buffer[0] in "{[":
            opening, self._buffer = self._buffer[0], self._buffer[1:]
            self._open(opening)
        else:
            self._give_back()
        return True

    def _open(self, bracket: str) -> None:
        self._listed = bracket == "["
        if self._listed:
            self._raw.append(bracket)
        else:
            self._buffer = bracket + self._buffer
        self._begin(self._new_scanner())

    def _new_scanner(self) -> CallScanner:
        return CallScanner(None if self._tagged else self.names)

    def _after(self) -> bool:
        if not self._skip(" \t\r\n"):
            return False
        following = self._buffer[0]
        if following in (",;]" if self._listed else ",;"):
            self._buffer = self._buffer[1:]
            self._listed = self._listed and following != "]"
            return True
        if following == "{":
            self._begin(self._new_scanner())
            return True
        if self._fenced:
            fence = self._accept("```")
            if fence is None:
                return False
        self._line_begins = True
        self._state = self._content
        return True

    def _at_end(self) -> None:
        """JSON that was never a call is content; a marker that never came was text."""
        if self._raw:
            self._give_back()
        super()._at_end()

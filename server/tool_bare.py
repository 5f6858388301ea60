"""Tool calls as bare JSON: Llama 3, and models that were told so in a system message."""

from __future__ import annotations

import re

from tokenmill.server.chat_markup import cut, partial
from tokenmill.server.tool_json import CallScanner
from tokenmill.server.tool_parser import ToolParser


class BareParser(ToolParser):
    """Calls as JSON objects at the beginning of a line, alone, in a list or in a fenced block.

    Only an object with the name of a function that there is, and with arguments, is a call: other JSON is
    content. Behind Llama 3's `<|python_tag|>` any name is.
    """

    TAG = "<|python_tag|>"
    _TRIGGER = re.compile(r"<\|python_tag\|>|(?m:^)[ \t]*(?P<json>```|[{\[])")
    _HALF_FENCE = re.compile(r"(?m:^)[ \t]*(`{1,2})\Z")
    _line_begins = True
    _listed = _fenced = _tagged = False

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
        self._keep_blanks()
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
        return CallScanner(None if self._tagged else self.functions)

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
        self._line_begins = True
        if self._fenced:
            return self._close("```")
        self._state = self._content
        return True

    def _at_end(self, cut: bool) -> None:
        """JSON that was never a call is content, unless it was cut on its way to be one."""
        promising = cut and self._state == self._scan and self._scanner.promising
        if self._raw and not (self.required or promising):
            self._give_back()
        super()._at_end(cut)

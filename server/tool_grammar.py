"""Tool calls as a grammar: which functions, in the model's own markup, with arguments that fit their schemas.

required    start: thoughts? calls                       (or: thoughts? (answer | calls))
strict      start: TEXT | (until_call calls)+ TEXT?      (until_call ends with the form's opening marker)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.chat_lark import LarkPieces, json_value, lark, pattern
from tokenmill.server.reasoning import Tags
from tokenmill.server.tool_forms import ToolForm
from tokenmill.server.tool_protocol import Tool

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class CallGrammar:
    """Writes the grammars of one request's tools."""

    def __init__(self, tokenizer: Tokenizer, form: ToolForm, tools: Sequence[Tool], parallel: bool) -> None:
        self._pieces = LarkPieces(tokenizer)
        self._form = form
        self._tools = tools
        self._parallel = parallel

    def required(self, tags: Tags | None, opened: bool) -> Grammar:
        """Nothing but calls, at least one; behind thoughts where the model has them."""
        return self._grammar("calls", [], tags, opened)

    def or_answer(self, answer: str, tags: Tags | None, opened: bool) -> Grammar:
        """Calls, or what the rule `answer` allows. For forms with an opening marker."""
        return self._grammar("(answer | calls)", [answer], tags, opened)

    def _grammar(self, start: str, more: list[str], tags: Tags | None, opened: bool) -> Grammar:
        start, rules = self._pieces.behind_thoughts(start, tags, opened)
        one = [self._call(number, tool, strict=True) for number, tool in enumerate(self._tools)]
        calls = self._calls(self._form.wrapping.start, repeats=self._parallel)
        return lark(start, [*rules, *more, calls, *one])

    def strict(self) -> Grammar | None:
        """Free text, but behind the opening marker calls of these functions, strict ones to the letter.

        None for a form without such a marker, and where no function is strict.
        """
        opening = self._form.opening
        if opening is None or not any(tool.function.strict for tool in self._tools):
            return None
        # Where one marker stands before all calls, more of them follow without another.
        begin = self._form.wrapping.start
        repeats = self._parallel and bool(begin)
        one = [
            self._call(number, tool, bool(tool.function.strict), "" if begin else opening)
            for number, tool in enumerate(self._tools)
        ]
        calls = self._calls(begin.removeprefix(opening), repeats)
        rules = [calls, *one, *self._pieces.until("until_call", opening)]
        text = "/(?s:.+)/"
        if self._pieces.token(opening) is None:
            text += f" & ~/(?s:.*){pattern(opening)}(?s:.*)/"
        times = "(until_call calls)+" if self._parallel else "until_call calls"
        return lark(f"TEXT | {times} TEXT? | ", [*rules, f"TEXT: {text}"])

    def _calls(self, begin: str, repeats: bool) -> str:
        """The rule of all calls, `begin` before them."""
        form, markers = self._form.wrapping, self._form.markers
        one = "(" + " | ".join(f"call_{number}" for number in range(len(self._tools))) + ")"
        more = f"({self._pieces.literal(form.between, markers)} {one})*" if repeats else ""
        end = self._pieces.literal(form.end, markers)
        return f"calls: {self._pieces.literal(begin, markers)} {one} {more} {end}"

    def _call(self, number: int, tool: Tool, strict: bool, without: str = "") -> str:
        """The rule of one call; `without` the marker that was read before."""
        form, markers = self._form.wrapping, self._form.markers
        schema = ANY_OBJECT
        if strict:
            schema = NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters
        before = form.before.replace("{name}", tool.function.name).removeprefix(without)
        literals = [self._pieces.literal(text, markers) for text in (before, form.after)]
        return f"call_{number}: {literals[0]} {json_value(schema)} {literals[1]}"

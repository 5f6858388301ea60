"""Tool calls as a grammar: which functions, in the model's own markup, with arguments that fit their schemas.

The grammars are llguidance's Lark: `%json {schema}` stands for a JSON value, `<[id]>` for a token. A marker
that is one token of the model's is required as that token, since as plain text it would be another word.

    required    start: thoughts? calls
    strict      start: TEXT | (until_call call)+ TEXT?       (until_call ends with the form's opening marker)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.reasoning import Tags
from tokenmill.server.tool_forms import ToolForm, split_name
from tokenmill.server.tool_protocol import Tool

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Arguments are written as Python's json module writes them: small models would fill a context with blanks."""


class CallGrammar:
    """Writes the grammars of one request's tools."""

    def __init__(self, tokenizer: Tokenizer, form: ToolForm, tools: Sequence[Tool], parallel: bool) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._tools = tools
        self._parallel = parallel

    def required(self, thoughts: Tags | None, opened: bool) -> Grammar:
        """Nothing but calls, at least one; behind thoughts where the model has them."""
        rules = self._calls(strict_only=False)
        start = "calls"
        if thoughts is not None:
            begin = "" if opened else f"{self._literal(thoughts.open, (thoughts.open,))} "
            start = f"{begin}thoughts BLANKS calls" + ("" if opened else " | calls")
            rules += [*self._until("thoughts", thoughts.close), r"BLANKS: /\s{0,8}/"]
        return _grammar(start, rules)

    def strict(self) -> Grammar | None:
        """Free text, but behind the opening marker calls of these functions, strict ones to the letter.

        None for a form without such a marker, and where no function is strict.
        """
        opening = self._form.opening
        if opening is None or not any(tool.function.strict for tool in self._tools):
            return None
        rules = self._calls(strict_only=True, without=opening)
        if self._token(opening) is not None:
            rules += self._until("until_call", opening)
            text = "TEXT: /(?s:.+)/"
        else:
            rules += self._until("until_call", opening)
            text = f"TEXT: /(?s:.+)/ & ~/(?s:.*){_pattern(opening)}(?s:.*)/"
        times = "(until_call calls)+" if self._parallel else "until_call calls"
        return _grammar(f"TEXT | {times} TEXT? | ", [*rules, text])

    def _calls(self, strict_only: bool, without: str = "") -> list[str]:
        """The rules of `calls`; `without` the marker that was read before."""
        form = self._form.wrapping
        markers = self._form.markers
        rules = []
        for number, tool in enumerate(self._tools):
            begin, behind_name = split_name(form.before)
            if not form.start:
                begin = begin.removeprefix(without)
            before = self._literal(begin + tool.function.name + behind_name, markers)
            schema = tool.function.parameters if tool.function.parameters is not None else NO_PARAMETERS
            if strict_only and not tool.function.strict:
                schema = ANY_OBJECT
            rules.append(f"call_{number}: {before} %json {_schema(schema)} {self._literal(form.after, markers)}")
        one = "(" + " | ".join(f"call_{number}" for number in range(len(self._tools))) + ")"
        start = form.start.removeprefix(without) if form.start else ""
        # Behind free text each call brings its own opening marker.
        repeats = self._parallel and (not without or bool(form.start))
        more = f"({self._literal(form.between, markers)} {one})*" if repeats else ""
        body = f"{self._literal(start, markers)} {one} {more} {self._literal(form.end, markers)}"
        return [f"calls: {body}", *rules]

    def _until(self, name: str, marker: str) -> list[str]:
        """Rules for any text through its first `marker`."""
        token = self._token(marker)
        if token is None:
            return [f"{name}[lazy]: /(?s:.*){_pattern(marker)}/"]
        return [f"{name}: {name.upper()} <[{token}]> | <[{token}]>", f"{name.upper()}: /(?s:.+)/"]

    def _token(self, marker: str) -> int | None:
        """The token that a marker is, where it is one that plain text can't spell."""
        ids = self._tokenizer.encode(marker, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def _literal(self, text: str, markers: Sequence[str]) -> str:
        """A text as a sequence of Lark's strings and tokens; nothing for the empty text."""
        tokens = {marker: token for marker in markers if (token := self._token(marker)) is not None}
        if not tokens:
            return _quote(text)
        parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text)
        return " ".join(f"<[{tokens[part]}]>" if part in tokens else _quote(part) for part in parts if part)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _pattern(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text, flags=re.ASCII)


def _schema(schema: dict[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": LAYOUT}, ensure_ascii=False)


def _grammar(start: str, rules: Sequence[str]) -> Grammar:
    return Grammar("grammar", "\n".join([f"start: {start}", *rules]) + "\n")

"""Pieces of Lark grammars, as llguidance reads them, about one model's tokens and thoughts.

`%json {schema}` stands for a JSON value, `<[id]>` for a token, `name[lazy]` for a word that ends as soon as
it can. A marker that is one token of the model's is required as that token: spelled out, it would be others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.reasoning import Tags

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is laid out as Python's json module does it: small models would fill a context with blanks."""


class LarkPieces:
    """Writes pieces of grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def token(self, marker: str) -> int | None:
        """The one token that a marker is, or None."""
        ids = self._tokenizer.encode(marker, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def literal(self, text: str, markers: Sequence[str] = ()) -> str:
        """A text as strings and tokens; nothing for the empty text."""
        tokens = {marker: token for marker in markers if (token := self.token(marker)) is not None}
        if not tokens:
            return quoted(text)
        parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text)
        return " ".join(f"<[{tokens[part]}]>" if part in tokens else quoted(part) for part in parts if part)

    def until(self, name: str, marker: str) -> list[str]:
        """Rules by which `name` is any text through its first `marker`."""
        token = self.token(marker)
        if token is None:
            return [f"{name}[lazy]: /(?s:.*){pattern(marker)}/"]
        return [f"{name}: {name.upper()}? <[{token}]>", f"{name.upper()}: /(?s:.+)/"]

    def behind_thoughts(self, rule: str, tags: Tags | None, opened: bool) -> tuple[str, list[str]]:
        """The start of a grammar for `rule`, behind thoughts where there are some, and the rules it needs."""
        if tags is None:
            return rule, []
        rules = [*self.until("thoughts", tags.close), r"BLANKS: /\s{0,8}/"]
        if opened:
            return f"thoughts BLANKS {rule}", rules
        return f"{self.literal(tags.open, [tags.open])} thoughts BLANKS {rule} | {rule}", rules


def answer_grammar(grammar: Grammar, tokenizer: Tokenizer, tags: Tags | None, opened: bool) -> Grammar:
    """The grammar of an answer, with room for the model's thoughts before it.

    A grammar in the client's own words stays as it is: it can't be a rule of another.
    """
    answer = answer_rule(grammar)
    if tags is None or answer is None:
        return grammar
    start, rules = LarkPieces(tokenizer).behind_thoughts("answer", tags, opened)
    return lark(start, [*rules, answer])


def answer_rule(grammar: Grammar) -> str | None:
    """The rule `answer` for what a grammar allows; None for one in the client's own words."""
    if grammar.kind == "grammar":
        return None
    if grammar.kind == "json_schema":
        return f"answer: {json_value(json.loads(grammar.text))}"
    if grammar.kind == "choice":
        return "answer: " + " | ".join(map(quoted, json.loads(grammar.text)))
    escaped = re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", grammar.text)
    return "answer: /" + escaped.replace("\n", r"\n") + "/"


def json_value(schema: Any) -> str:
    """A JSON value of this schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': LAYOUT}, ensure_ascii=False)}"


def quoted(text: str) -> str:
    """A string, or nothing for the empty text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def pattern(text: str) -> str:
    """A regular expression that matches just this text."""
    # Only what has a meaning: an escaped < would be a word's beginning.
    return re.sub(r"([\\.+*?()\[\]{}|^$/])", r"\\\1", text)


def lark(start: str, rules: Sequence[str]) -> Grammar:
    """A whole grammar."""
    return Grammar("grammar", "\n".join([f"start: {start}", *rules]) + "\n")

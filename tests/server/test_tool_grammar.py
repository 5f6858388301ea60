"""Grammars of tool calls, compiled by llguidance: what they allow is what the parsers read."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from chat_engine import EOS, TOKENIZER
from fake_engine import TOKENIZER as PLAIN
from tokenizers import Tokenizer as Library

from tokenmill.engine.grammar import GrammarCompiler, Matcher
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.chat_lark import answer_grammar, answer_rule
from tokenmill.server.chat_text import ChatText
from tokenmill.server.reasoning import Tags
from tokenmill.server.tool_forms import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    HERMES,
    JSON,
    LLAMA3,
    MISTRAL,
    MISTRAL_LIST,
    ToolForm,
)
from tokenmill.server.tool_grammar import NO_PARAMETERS, CallGrammar
from tokenmill.server.tool_protocol import Tool

FORMS = [HERMES, LLAMA3, MISTRAL, MISTRAL_LIST, DEEPSEEK, DEEPSEEK_FENCED, JSON]
NAMES = ["hermes", "llama3", "mistral", "mistral list", "deepseek", "deepseek fenced", "json"]
TAGS = Tags("<think>", "</think>")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "array", "items": {"enum": ["[", "}", '"']}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "pattern": "^[a-c]{1,3}$"}},
}
TOOLS = [
    Tool.model_validate(
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
    ),
    Tool.model_validate({"type": "function", "function": {"name": "now", "description": "start: x ::= y"}}),
]
SCHEMAS = {"f": SCHEMA, "now": NO_PARAMETERS}


class Model:
    """A tokenizer, and what it compiles."""

    def __init__(self, info: Any) -> None:
        self.tokenizer = Tokenizer(info)
        self.library = Library.from_str(info.tokenizer_json)
        self._compiler = GrammarCompiler(info.tokenizer_json, info.vocab_size, info.eos_ids)
        self._words = self._compiler.words

    def compile(self, grammar: Grammar) -> Matcher:
        return self._compiler.compile(grammar).result().copy()

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether a text, tokenised as the model does it, is a whole sentence of the grammar."""
        matcher = self.compile(grammar)
        ids = self.library.encode(text, add_special_tokens=False).ids
        return matcher.consume([*ids, self.tokenizer.info.eos_ids[0]])

    def babble(self, grammar: Grammar, generator: random.Random) -> str:
        """A random sentence of the grammar."""
        matcher, ids = self.compile(grammar), []
        mask = np.zeros((1, self._words), np.int32)
        for _ in range(3000):
            matcher.fill(mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            assert len(allowed), matcher.error
            if EOS in allowed and generator.random() < 0.5:
                break
            token = int(generator.choice(allowed))
            if token == EOS:
                break
            assert matcher.consume([token])
            ids.append(token)
        else:
            pytest.fail("the grammar never came to an end")
        return str(self.library.decode(ids, skip_special_tokens=False))


MARKED = Model(TOKENIZER)
UNMARKED = Model(PLAIN)


def calls_in(form: ToolForm, text: str, limit: int | None = None) -> list[tuple[str, Any]]:
    """The calls that the form's parser reads, which must be all that there is."""
    read = ChatText(None, form.parser(dict.fromkeys(SCHEMAS, ()), limit))
    read.feed(text)
    read.finish("stop")
    assert read.message()["content"] is None, text
    return [(call.name, json.loads("".join(call.arguments))) for call in read.calls]


@pytest.mark.parametrize("model", [MARKED, UNMARKED], ids=["tokens", "text"])
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_what_is_required_can_be_read(form: ToolForm, model: Model) -> None:
    generator = random.Random(1)
    for parallel in (True, False):
        grammar = CallGrammar(model.tokenizer, form, TOOLS, parallel).required(None, False)
        counts = set()
        for _ in range(8):
            calls = calls_in(form, model.babble(grammar, generator))
            counts.add(len(calls))
            for name, arguments in calls:
                jsonschema.validate(arguments, SCHEMAS[name])
        assert 0 not in counts
        assert parallel or counts == {1}


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_LIST, DEEPSEEK, DEEPSEEK_FENCED])
@pytest.mark.parametrize("model", [MARKED, UNMARKED], ids=["tokens", "text"])
def test_strict_functions_behind_free_text(form: ToolForm, model: Model) -> None:
    grammar = CallGrammar(model.tokenizer, form, TOOLS, True).strict()
    assert grammar is not None
    wrapping = form.wrapping

    def written(arguments: str, name: str = "f") -> str:
        before = wrapping.before.replace("{name}", name)
        return f"{wrapping.start}{before}{arguments}{wrapping.after}{wrapping.end}"

    good = '{"city": "ab", "days": 3}'
    assert model.accepts(grammar, "")
    assert model.accepts(grammar, "No call <at> all.")
    assert model.accepts(grammar, written(good))
    assert model.accepts(grammar, f"Let me see.\n{written(good)}")
    assert model.accepts(grammar, f"{written(good)} {written(good)}")
    assert model.accepts(grammar, written('{"anything": [1]}', "now"))
    assert not model.accepts(grammar, written('{"city": "x", "days": 3}'))
    assert not model.accepts(grammar, f"Hm. {written('{}')}")
    assert not model.accepts(grammar, written(good, "unknown"))


def test_forms_without_a_marker_have_no_strict_grammar() -> None:
    for form in (LLAMA3, JSON):
        assert CallGrammar(MARKED.tokenizer, form, TOOLS, True).strict() is None
    assert CallGrammar(MARKED.tokenizer, HERMES, TOOLS[1:], True).strict() is None


@pytest.mark.parametrize("model", [MARKED, UNMARKED], ids=["tokens", "text"])
def test_required_calls_behind_thoughts(model: Model) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    grammars = CallGrammar(model.tokenizer, HERMES, TOOLS, True)
    opened, closed = grammars.required(TAGS, True), grammars.required(TAGS, False)
    assert model.accepts(opened, f"Hm, <b>.\n</think>\n\n{call}")
    assert not model.accepts(opened, call)
    assert model.accepts(closed, f"<think>Hm.</think>{call}")
    assert model.accepts(closed, call)
    assert not model.accepts(closed, f"Hm.</think>{call}")
    assert not model.accepts(closed, "<think>Hm.</think>Sunny.")


ANSWERS: list[tuple[Grammar, str, str]] = [
    (Grammar("json_schema", json.dumps(SCHEMA)), '{"city": "a", "days": 2}', '{"city": "a"}'),
    (Grammar("json_schema", "{}"), "[1]", "["),
    (Grammar("choice", '["yes", "a/b\\n\\"c"]'), 'a/b\n"c', "no"),
    (Grammar("regex", "[0-9]+/\\/x"), "12//x", "12/x"),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), ANSWERS)
@pytest.mark.parametrize("model", [MARKED, UNMARKED], ids=["tokens", "text"])
def test_answers_behind_thoughts(grammar: Grammar, good: str, bad: str, model: Model) -> None:
    opened = answer_grammar(grammar, model.tokenizer, TAGS, True)
    assert model.accepts(opened, f"Hm.</think>\n{good}")
    assert not model.accepts(opened, f"Hm.</think>\n{bad}")
    closed = answer_grammar(grammar, model.tokenizer, TAGS, False)
    assert model.accepts(closed, f"<think>Hm.</think>{good}")
    assert model.accepts(closed, good)
    assert not model.accepts(closed, bad)


@pytest.mark.parametrize("model", [MARKED, UNMARKED], ids=["tokens", "text"])
@pytest.mark.parametrize("form", [form for form in FORMS if form.opening is not None])
def test_calls_or_an_answer(form: ToolForm, model: Model) -> None:
    rule = answer_rule(Grammar("json_schema", json.dumps(SCHEMA)))
    assert rule is not None
    grammars = CallGrammar(model.tokenizer, form, TOOLS, parallel=False)
    grammar = grammars.or_answer(rule, None, False)
    call = form.wrapping.start + form.wrapping.before.replace("{name}", "now") + "{}"
    call += form.wrapping.after + form.wrapping.end
    assert model.accepts(grammar, call)
    assert model.accepts(grammar, '{"city": "a", "days": 2}')
    assert not model.accepts(grammar, '{"city": "a"}')
    assert not model.accepts(grammar, "Sunny.")
    thinking = grammars.or_answer(rule, TAGS, True)
    assert model.accepts(thinking, f"Hm.</think>{call}")
    assert model.accepts(thinking, 'Hm.</think>{"city": "a", "days": 2}')
    assert not model.accepts(thinking, "Hm.</think>Sunny.")


def test_grammars_that_stay_as_they_are() -> None:
    own = Grammar("grammar", 'start: "a"')
    assert answer_grammar(own, MARKED.tokenizer, TAGS, True) is own
    schema = Grammar("json_schema", "{}")
    assert answer_grammar(schema, MARKED.tokenizer, None, True) is schema

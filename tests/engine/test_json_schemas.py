"""More than two hundred JSON schemas: what a random model completes is valid, what is cut can be completed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest
from json_schemas import BY_HAND, REFUSED, Schema, generated

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.grammar import GrammarCompiler, GrammarError, Matcher
from tokenmill.engine.llm import Choice
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tiny import make_tiny

SCHEMAS = BY_HAND + [generated(seed) for seed in range(140)]
PROMPT = [20, 30, 40]
CLOSING = '"}]'
LENGTHS = (200, 200, 7, 23)
"""Tokens allowed to the answers of each schema: enough, and too few."""
MOST_STEPS = 400
"""Tokens in which any cut text of these schemas can be completed, given that brackets are closed soonest."""

checker = jsonschema.FormatChecker(formats=("date", "ipv4", "ipv6", "uuid", "email"))


@checker.checks("date-time")
def is_date_time(value: object) -> bool:
    """RFC 3339, its leap seconds included."""
    clock = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
    return not isinstance(value, str) or bool(
        re.fullmatch(rf"\d{{4}}-\d\d-\d\dT{clock}", value, re.IGNORECASE)
    )


def validate(text: str, schema: Schema) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(make_tiny("llama", tmp_path_factory.mktemp("schemas"))), max_context=512, num_blocks=4000)


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> Iterator[GrammarCompiler]:
    model = llm.engine.model
    made = GrammarCompiler(model.tokenizer.tokenizer_json, model.logits_width, model.eos_ids)
    yield made
    made.close()


@pytest.fixture(scope="module")
def answers(llm: LLM) -> list[tuple[Schema, Choice]]:
    """What the model writes under each schema, all of them in one crowd; it likes to close what is open."""
    bias = {llm.tokenizer.encode(character, False)[0]: 3.0 for character in CLOSING}
    asked = [
        (schema, SamplingParams(grammar=grammar_of(schema), max_tokens=length, seed=seed, logit_bias=bias))
        for schema in SCHEMAS
        for seed, length in enumerate(LENGTHS)
    ]
    outputs = llm.generate([PROMPT] * len(asked), [params for _, params in asked])
    return [(schema, output.choices[0]) for (schema, _), output in zip(asked, outputs, strict=True)]


def grammar_of(schema: Schema | bool) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def test_every_completed_answer_is_valid(answers: list[tuple[Schema, Choice]]) -> None:
    completed = [(schema, choice.text) for schema, choice in answers if choice.finish_reason == "stop"]
    assert len({json.dumps(schema) for schema, _ in completed}) >= 200
    for schema, text in completed:
        validate(text, schema)


def test_every_cut_answer_can_be_completed(
    answers: list[tuple[Schema, Choice]], llm: LLM, compiler: GrammarCompiler
) -> None:
    cut = [(schema, choice) for schema, choice in answers if choice.finish_reason != "stop"]
    assert len(cut) >= 100
    for schema, choice in cut:
        assert choice.finish_reason == "length", (schema, choice.error)
        matcher = compiler.compile(grammar_of(schema)).result().copy()
        assert matcher.consume(choice.token_ids), (schema, choice.text)
        rest = shortest_end(matcher, llm, compiler.words)
        text = llm.tokenizer.decode(choice.token_ids + rest)
        assert text.startswith(choice.text.rstrip("�"))
        validate(text, schema)


def shortest_end(matcher: Matcher, llm: LLM, words: int) -> list[int]:
    """Tokens that complete a text: its end where it may end, else what closes, else any that may follow."""
    ends = set(llm.engine.model.eos_ids)
    opening, *closing = [llm.tokenizer.encode(character, False)[0] for character in '{}"@]']
    dice = np.random.default_rng(0)
    mask = np.zeros((1, words), np.int32)
    rest: list[int] = []
    for _ in range(MOST_STEPS):
        if matcher.stopped:
            return rest
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if ends.intersection(allowed.tolist()):
            return rest
        # In a string a brace is text, and a quote leads out; after a brace it would lead on to a key.
        preferred = closing if rest[-1:] == [opening] else [*closing[1:], closing[0]]
        token = next((one for one in preferred if one in allowed), int(dice.choice(allowed)))
        assert matcher.consume([token])
        rest.append(token)
    raise AssertionError(f"not completed: {llm.tokenizer.decode(rest)!r}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(compiler: GrammarCompiler, name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(GrammarError, match=re.escape(reason)):
        compiler.compile(grammar_of(schema)).result()

"""Grammars: what a random model writes under them is legal, and what can't be compiled is refused."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import Future
from types import SimpleNamespace

import jsonschema
import pytest

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.grammar import CACHED, CACHED_CHARACTERS, MAX_DEPTH, GrammarCompiler, Matcher
from tokenmill.engine.grammar_queue import GrammarQueue
from tokenmill.engine.messages import Add
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tiny import make_tiny

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ENDLESS = '{"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}'
PROMPT = [20, 30, 40]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(make_tiny("llama", tmp_path_factory.mktemp("grammar"))), max_context=512, num_blocks=400)


def under(kind: str, text: str, **settings: object) -> SamplingParams:
    fields = {"max_tokens": 200, "seed": 1, **settings}
    return SamplingParams(grammar=Grammar(kind, text), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_schema_is_kept_by_all_choices_in_a_crowd(llm: LLM, overlap: bool) -> None:
    llm.engine.overlap = overlap
    params = under("json_schema", json.dumps(PERSON), n=6, temperature=1.5)
    free = SamplingParams(max_tokens=50, seed=2)
    outputs = llm.generate([PROMPT, PROMPT, PROMPT[:1]], [params, free, params])
    for output in (outputs[0], outputs[2]):
        for choice in output.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.text), PERSON)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"[a-f]{3}-\d{2,4}", r"[a-f]{3}-\d{2,4}"),
        ("choice", '["yes", "no", "per\\"haps"]', 'yes|no|per"haps'),
        ("grammar", 'start: "<" /[a-z]+/ ">"', "<[a-z]+>"),
        ("grammar", 'root ::= "x" [0-9] [0-9]?', "x[0-9]{1,2}"),
    ],
)
def test_other_kinds(llm: LLM, kind: str, text: str, pattern: str) -> None:
    for seed in range(8):
        choice = llm.generate([PROMPT], under(kind, text, seed=seed))[0].choices[0]
        assert choice.finish_reason == "stop"
        assert re.fullmatch(pattern, choice.text), choice.text


def test_a_cut_text_is_a_legal_prefix(llm: LLM) -> None:
    for length in range(1, 12):
        choice = llm.generate([PROMPT], under("regex", "(abc){20}", max_tokens=length))[0].choices[0]
        assert ("abc" * 20).startswith(choice.text)


@pytest.mark.parametrize("overlap", [False, True])
def test_drafts_penalties_and_logprobs_under_a_grammar_change_nothing(llm: LLM, overlap: bool) -> None:
    llm.engine.overlap = overlap
    params = under(
        "json_schema", json.dumps(PERSON), logprobs=2, presence_penalty=0.5, repetition_penalty=1.1
    )
    alone = llm.generate([PROMPT], params)[0].choices[0]
    wrong = [*alone.token_ids[:5], 3, *alone.token_ids[5:]]
    crowd = [params, SamplingParams(seed=4, max_tokens=60, frequency_penalty=1.0), params]
    outputs = llm.generate([PROMPT] * 3, crowd, predictions=[alone.token_ids, None, wrong])
    for output in (outputs[0], outputs[2]):
        assert output.choices[0].token_ids == alone.token_ids
        assert output.choices[0].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert outputs[0].accepted_drafts > 0


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", '{"type": "nonsense"}'),
        ("json_schema", '{"$ref": "#"}'),
        ("json_schema", ENDLESS),
        ("grammar", f"start: %json {ENDLESS}"),
        ("json_schema", '{"items":' * 30_000 + "{}" + "}" * 30_000),
        ("regex", "(" * 30_000 + ")" * 30_000),
        ("json_schema", "false"),
        ("regex", "[a"),
        ("grammar", "start: missing"),
        ("grammar", 'root ::= nothing "a"'),
        ("grammar", "root ::= ("),
        ("grammar", "(" * (MAX_DEPTH + 1)),
        ("grammar", ""),
        ("choice", "[]"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_leaves_nothing(llm: LLM, kind: str, text: str) -> None:
    engine = llm.engine
    engine.add(Add(10**6, PROMPT, under(kind, text, n=2)))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [(d.finish, d.invalid) for d in deltas] == [("error", True)] * 2
    assert deltas[0].error
    assert engine.pool.used_blocks == 0


@pytest.mark.parametrize("text", ["(a+)+b", "a{1,99999}{1,99999}", "(a|aa)*c?"])
def test_ambiguous_and_huge_repetitions_are_served(llm: LLM, text: str) -> None:
    choice = llm.generate([PROMPT], under("regex", text, max_tokens=30))[0].choices[0]
    assert re.fullmatch("a+b?c?", choice.text)


def test_thousands_of_choices_are_served(llm: LLM) -> None:
    choices = [f"mill {number}" for number in range(9000)]
    choice = llm.generate([PROMPT], under("choice", json.dumps(choices)))[0].choices[0]
    assert (choice.text in choices, choice.finish_reason) == (True, "stop")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "panic: assertion failed: symbols.len() < 65525 <backtrace> 0: <unknown>",
            "it is too large to be compiled",
        ),
        ("at 1(8):\n unknown name\n<non-verbose/>", "at 1(8): unknown name"),
    ],
)
def test_errors_of_the_compiler_are_one_line_without_its_stack(error: str, said: str) -> None:
    raised = SimpleNamespace(is_error=lambda: True, get_error=lambda: error)
    assert Matcher(raised).error == said  # type: ignore[arg-type]


def test_kept_grammars_are_bounded_by_their_text(llm: LLM) -> None:
    compiler = GrammarCompiler(llm.engine.model.tokenizer.tokenizer_json, 320, [2])
    grammars = [Grammar("regex", f"{number}" * (CACHED_CHARACTERS // 3)) for number in range(8)]
    matcher = Matcher(None)  # type: ignore[arg-type]
    for grammar in grammars:
        compiler.remember(grammar, matcher)
    assert list(compiler._cache) == grammars[-3:]
    for number in range(CACHED + 5):
        compiler.remember(Grammar("regex", str(number)), matcher)
    assert len(compiler._cache) == CACHED
    compiler.close()


def test_only_the_time_that_a_compiler_takes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the wait for one nor the time that the whole machine was asleep makes a grammar late."""
    future: Future[Matcher] = Future()
    queue = GrammarQueue(SimpleNamespace(compile=lambda grammar: future))  # type: ignore[arg-type]
    queue.add("the first", Grammar("regex", "a"))  # type: ignore[arg-type]
    now = time.monotonic()

    def look(later_s: float) -> list[str]:
        nonlocal now
        now += later_s
        with monkeypatch.context() as clock:
            clock.setattr(time, "monotonic", lambda: now)
            return [str(error) for _, error in queue.ready(0)]

    assert look(100) == []
    future.set_running_or_notify_cancel()
    assert look(100) == []
    for _ in range(9):
        assert look(1) == []
    assert look(1) == ["the grammar took longer than 10 s to compile"]
    assert not queue


def test_a_grammar_under_way_can_be_aborted(llm: LLM) -> None:
    engine = llm.engine
    engine.add(Add(10**6, PROMPT, under("json_schema", json.dumps(PERSON), n=2)))
    engine.abort(10**6)
    while engine.has_work:
        assert engine.step() == []


def test_min_tokens_yields_where_the_grammar_is_complete(llm: LLM) -> None:
    for seed in range(12):
        params = under("choice", '["grind", "grinding"]', seed=seed, min_tokens=6)
        choice = llm.generate([PROMPT], params)[0].choices[0]
        assert (choice.text, choice.finish_reason) in (("grind", "stop"), ("grinding", "stop"))


def test_a_bias_that_bans_all_that_a_grammar_allows_is_refused(llm: LLM) -> None:
    allowed = dict.fromkeys(range(llm.engine.model.logits_width), -100.0)
    llm.engine.add(Add(10**6, PROMPT, under("regex", "abc", logit_bias=allowed)))
    deltas = []
    while llm.engine.has_work:
        deltas += llm.engine.step()
    assert [(d.finish, d.invalid) for d in deltas] == [("error", True)]


def test_a_grammar_ends_without_an_eos_when_nothing_can_follow(llm: LLM) -> None:
    choice = llm.generate([PROMPT], under("regex", "abc", min_tokens=100))[0].choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "stop")

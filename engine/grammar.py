"""Grammars that a completion must follow, enforced token by token with llguidance.

    Grammar ──compile (a thread, bounded LRU)──▶ Matcher ──copy for each choice──▶ fill(bitmask) / consume(tokens)

Compiling never runs on the step loop. llguidance bounds its own work by fuel; what its recursive parsers can't
take, text nested thousands deep, is refused before it gets there. It is imported for the first grammar.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.schema_check import check_schema
from tokenmill.engine.schema_closing import close_objects
from tokenmill.engine.schema_walk import replace_embedded

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_DEPTH = 200
MAX_TEXT = 1 << 20
CACHED = 256
CACHED_CHARACTERS = 2 << 20
"""Of the compiled grammars' texts together: a matcher takes some 50 bytes a character."""
WORKERS = 2
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between JSON tokens. Bounded: small models would fill a context with blanks."""


class GrammarError(ValueError):
    """The grammar can't be compiled; the message says why."""


class Matcher:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy())

    @property
    def stopped(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """Why the matcher gave up (its limits, a token that it didn't allow), or an empty string."""
        return _in_words(str(self._matcher.get_error())) if self._matcher.is_error() else ""

    def consume(self, tokens: Sequence[int]) -> bool:
        """Advance; False, and an `error`, when a token isn't allowed."""
        return bool(self._matcher.consume_tokens(list(tokens)))

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens could be consumed."""
        return int(self._matcher.validate_tokens(list(tokens))) if tokens else 0

    def fill(self, mask: NDArray[np.int32], drafts: Sequence[int] = ()) -> None:
        """Write the allowed tokens, one bit each, into mask[0], and into mask[i] those after i drafts."""
        for row in range(len(drafts) + 1):
            if row:
                self._matcher.consume_token(drafts[row - 1])
            self._matcher.unsafe_compute_mask_ptr(mask[row].ctypes.data, mask[row].nbytes)
        if drafts:
            self._matcher.rollback(len(drafts))


class GrammarCompiler:
    """Compiles grammars for one tokenizer, off the caller's thread."""

    def __init__(self, tokenizer_json: str, width: int, eos_ids: Sequence[int]) -> None:
        """`width`: of the logits; `eos_ids` may end a completion wherever the grammar may end."""
        self.words = -(-width // 32)
        """32-bit words of one row of a bitmask."""
        self._source = (tokenizer_json, width, list(eos_ids))
        self._tokenizer: LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")
        self._cache: OrderedDict[Grammar, Matcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> Future[Matcher]:
        """A matcher at the beginning of `grammar`, to be copied before use; or a GrammarError."""
        done: Future[Matcher] = Future()
        cached = self._cache.get(grammar)
        if cached is not None:
            self._cache.move_to_end(grammar)
            done.set_result(cached)
            return done
        return self._pool.submit(self._compile, grammar)

    def remember(self, grammar: Grammar, matcher: Matcher) -> None:
        """Keep a compiled grammar for the next request (called by the thread that calls `compile`)."""
        self._cache[grammar] = matcher
        characters = sum(len(kept.text) for kept in self._cache)
        while len(self._cache) > CACHED or characters > CACHED_CHARACTERS:
            forgotten, _ = self._cache.popitem(last=False)
            characters -= len(forgotten.text)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._tokenizer is None:
            text, width, eos_ids = self._source
            self._tokenizer = LLTokenizer(text, n_vocab=width, eos_token=eos_ids or None)
        matcher = LLMatcher(
            self._tokenizer, to_llguidance(grammar), log_level=0, limits=LLParserLimits(verbose_errors=False)
        )
        found = Matcher(matcher)
        if not found.error:
            # The first mask shows what the limits say of it, while there is still a request to refuse.
            trial = found.copy()
            trial.fill(np.zeros((1, self.words), np.int32))
            found = found if not trial.error else trial
        if found.error:
            nothing = "NoExtension" in found.error
            raise GrammarError("no text can satisfy it" if nothing else found.error[:400])
        return found


def to_llguidance(grammar: Grammar) -> str:
    """The grammar as llguidance reads it; raises GrammarError for what shouldn't reach it."""
    from llguidance import LLMatcher

    if len(grammar.text) > MAX_TEXT:
        raise GrammarError(
            f"a {grammar.kind} of {len(grammar.text)} characters is over the limit of {MAX_TEXT}"
        )
    _check_depth(grammar)
    try:
        if grammar.kind == "json_schema":
            text = "{}" if grammar.text.strip() == "true" else json.dumps(_enforced(json.loads(grammar.text)))
            return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "choice":
            choices = json.loads(grammar.text)
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise GrammarError("a choice must list strings, at least one and none of them empty")
            # One terminal: as rules of their own, some 2,000 choices would be over the parser's limit.
            return LLMatcher.grammar_from_lark(
                "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices))
            )
        if not grammar.text.strip():
            raise GrammarError("the grammar is empty")
        return LLMatcher.grammar_from_lark(replace_embedded(_to_lark(grammar.text), _enforced))
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{grammar.kind}: {' '.join(str(error).split())[:400]}") from None


def _in_words(error: str) -> str:
    """llguidance's message on one line, without its marks and without the stack of a limit that it asserts."""
    if "panic:" in error:
        return "it is too large to be compiled"
    return " ".join(error.replace("<non-verbose/>", "").split())


def _enforced(schema: object) -> object:
    """The schema that is enforced in a given one's place: everything that satisfies it satisfies that."""
    check_schema(schema)
    return close_objects(schema)


def _to_lark(text: str) -> str:
    """Lark as it is, EBNF translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # the translator raises bare exceptions for what it can't read
        raise ValueError(str(error)) from None


def _check_depth(grammar: Grammar) -> None:
    """Refuse brackets nested so deep that a recursive parser would run out of stack."""
    depth, quoted, escaped = 0, False, False
    openings, closings = ("{[", "}]") if grammar.kind == "json_schema" else ("([{", ")]}")
    for character in grammar.text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"' and grammar.kind == "json_schema":
            quoted = not quoted
        elif quoted:
            continue
        elif character in openings:
            depth += 1
            if depth > MAX_DEPTH:
                raise GrammarError(f"the {grammar.kind} is nested more than {MAX_DEPTH} deep")
        elif character in closings:
            depth = max(0, depth - 1)

"""Tool calls in texts: every form, well and badly written, whole and in any pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.server.chat_text import ChatText
from tokenmill.server.config import TOOL_PARSERS
from tokenmill.server.reasoning import ReasoningParser, Tags
from tokenmill.server.tool_bare import BareParser
from tokenmill.server.tool_forms import choose_form
from tokenmill.server.tool_markers import DeepSeekParser, HermesParser, MistralParser
from tokenmill.server.tool_parser import ToolParser

NAMES = {"f": frozenset(["city"]), "g": frozenset[str]()}
PARIS = '{"city": "Paris"}'
NESTED = '{"a": {"b": [1, "}]", {"c": "\\"<"}]}, "d": null}'
Calls = list[tuple[str, str]]


def read(parser: ToolParser, pieces: Sequence[str], reason: str = "stop") -> tuple[str, Calls]:
    """The content and the calls (name, arguments) of a text that comes in pieces and ends for this reason."""
    text = ChatText(None, parser)
    for piece in pieces:
        text.feed(piece)
    text.finish(reason)
    message = text.message()
    content = message["content"] or ""
    assert isinstance(content, str)
    return content, [(call.name, "".join(call.arguments)) for call in text.calls]


B, E = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
ALL, ALL_END, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"
F = ("f", PARIS)
G = ("g", NESTED)


def hermes(name: str, arguments: str, key: str = "arguments") -> str:
    return f'<tool_call>\n{{"name": "{name}", "{key}": {arguments}}}\n</tool_call>'


def tagged(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def pairs(name: str, **values: str) -> str:
    written = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items()
    )
    return f"<tool_call>{name}\n{written}</tool_call>"


def deepseek(name: str, arguments: str) -> str:
    return f"{B}function{SEP}{name}\n```json\n{arguments}\n```{E}"


CASES: list[tuple[type[ToolParser], str, str, Calls]] = [
    # No call at all.
    (HermesParser, "Plain text.\n", "Plain text.\n", []),
    (HermesParser, "a < b <tool", "a < b <tool", []),
    (BareParser, "{not json}\n{}\n[1, 2]\n`x`", "{not json}\n{}\n[1, 2]\n`x`", []),
    (BareParser, '{"name": "John", "age": 3}', '{"name": "John", "age": 3}', []),
    (BareParser, '{"name": "f"}', '{"name": "f"}', []),
    (BareParser, '```python\nprint("f")\n```', '```python\nprint("f")\n```', []),
    (MistralParser, "[1] [TOOL", "[1] [TOOL", []),
    # Hermes, Qwen.
    (HermesParser, hermes(*F), "", [F]),
    (HermesParser, f"Let me see.\n\n{hermes(*F)}\n{hermes(*G)}\n", "Let me see.", [F, G]),
    (HermesParser, f"{hermes(*F)}\nDone.", "Done.", [F]),
    (HermesParser, hermes(*F, key="parameters"), "", [F]),
    (HermesParser, f'<tool_call>{{"arguments": {PARIS}, "name": "f"}}</tool_call>', "", [F]),
    (HermesParser, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HermesParser, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    (HermesParser, hermes("f", json.dumps(PARIS)), "", [F]),
    (
        HermesParser,
        f'<tool_call>{{"type": "function", "function": {{"name": "f", "arguments": {PARIS}}}}}</tool_call>',
        "",
        [F],
    ),
    (HermesParser, hermes("unknown", "{}"), "", [("unknown", "{}")]),
    (HermesParser, f'<tool_call>{{"name": "f", "arguments": {PARIS}</tool_call>', "", [F]),
    (HermesParser, f'<tool_call>{{"name": "f", "arguments": {PARIS}}}}}</tool_call>', "", [F]),
    (HermesParser, '<tool_call>{"name": "f", "arguments": {"city": "Pa', "", [("f", '{"city": "Pa')]),
    (HermesParser, '<tool_call>{"name": "f", "argu', "", []),
    (HermesParser, "<tool_call>what?</tool_call>", "<tool_call>what?</tool_call>", []),
    (HermesParser, "<tool_call>[1]</tool_call> x", "<tool_call>[1]</tool_call> x", []),
    (HermesParser, f"<tool_call>{hermes(*F)}", "<tool_call>", [F]),
    # Tags inside the tags, as later Qwen models write them.
    (HermesParser, tagged("f", city="Paris"), "", [F]),
    (HermesParser, f"Hm.\n{tagged('f', city='Paris')}\n{tagged('h')}\n", "Hm.", [F, ("h", "{}")]),
    (
        HermesParser,
        tagged("f", city="5", days="5", on="True", text="a\n<b>", list='["]"]'),
        "",
        [("f", '{"city": "5", "days": 5, "on": true, "text": "a\\n<b>", "list": ["]"]}')],
    ),
    (HermesParser, "<tool_call>\n<function=f>\n<parameter=city>\nPar", "", [("f", "")]),
    (HermesParser, "<tool_call><function=f></tool_call>", "", [("f", "{}")]),
    (HermesParser, "<tool_call> <function f>", "<tool_call> <function f>", []),
    (HermesParser, "<tool_call>\n<function=a b\n>", "<tool_call>\n<function=a b\n>", []),
    # GLM-4.5's pairs.
    (HermesParser, pairs("f", city="Paris"), "", [F]),
    (HermesParser, f"Hm.\n{pairs('f', city='Paris')}\n{pairs('g')}\n", "Hm.", [F, ("g", "{}")]),
    (
        HermesParser,
        pairs("f", city="5", days="5", on="true", text=" a\n<b>", list='["]"]'),
        "",
        [("f", '{"city": "5", "days": 5, "on": true, "text": " a\\n<b>", "list": ["]"]}')],
    ),
    (HermesParser, pairs("f", city="Paris").replace("\n", ""), "", [F]),
    (HermesParser, "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Par", "", [("f", "")]),
    (HermesParser, "<tool_call>f\n</tool_call>", "", [("f", "{}")]),
    (HermesParser, "<tool_call>word\n</tool_call>", "<tool_call>word\n</tool_call>", []),
    # Llama 3 and the generic form.
    (BareParser, f'{{"name": "f", "parameters": {PARIS}}}', "", [F]),
    (BareParser, f'<|python_tag|>{{"name": "x", "parameters": {PARIS}}}', "", [("x", PARIS)]),
    (BareParser, "<|python_tag|>import os", "import os", []),
    (BareParser, f'{{"type": "function", "name": "f", "parameters": {PARIS}}}', "", [F]),
    (
        BareParser,
        f'{{"name": "f", "parameters": {PARIS}}}; {{"name": "g", "parameters": {NESTED}}}',
        "",
        [F, G],
    ),
    (
        BareParser,
        f'Sure:\n{{"name": "f", "arguments": {PARIS}}}\n{{"name": "g", "arguments": {NESTED}}}\nThere.',
        "Sure:There.",
        [F, G],
    ),
    (BareParser, f'```json\n{{"name": "f", "arguments": {PARIS}}}\n```', "", [F]),
    (
        BareParser,
        f'[{{"name": "f", "arguments": {PARIS}}}, {{"name": "g", "arguments": {NESTED}}}]',
        "",
        [F, G],
    ),
    (BareParser, f'{{"name": "h", "arguments": {PARIS}}}', f'{{"name": "h", "arguments": {PARIS}}}', []),
    (
        BareParser,
        f'See {{"name": "f", "arguments": {PARIS}}}',
        f'See {{"name": "f", "arguments": {PARIS}}}',
        [],
    ),
    (BareParser, '{"name": "f", "arg', '{"name": "f", "arg', []),
    # Mistral, old and new.
    (MistralParser, f'[TOOL_CALLS] [{{"name": "f", "arguments": {PARIS}}}]', "", [F]),
    (
        MistralParser,
        f'Well.[TOOL_CALLS][{{"name": "f", "arguments": {PARIS}}}, {{"name": "g", "arguments": {NESTED}}}]',
        "Well.",
        [F, G],
    ),
    (MistralParser, f"[TOOL_CALLS]f[ARGS]{PARIS}[TOOL_CALLS]g[ARGS]{NESTED}", "", [F, G]),
    (MistralParser, f"[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{PARIS}", "", [F]),
    (MistralParser, f"[TOOL_CALLS]f{PARIS}", "", [F]),
    (MistralParser, "[TOOL_CALLS]no call here", "[TOOL_CALLS]no call here", []),
    (MistralParser, "[TOOL_CALLS]f[ARGS]nothing", "[TOOL_CALLS]f[ARGS]nothing", []),
    # DeepSeek, V3 and V3.1.
    (DeepSeekParser, f"Hm.{ALL}{deepseek(*F)}\n{deepseek(*G)}{ALL_END}", "Hm.", [F, G]),
    (DeepSeekParser, f"{ALL}{B}f{SEP}{PARIS}{E}{B}g{SEP}{NESTED}{E}{ALL_END}", "", [F, G]),
    (DeepSeekParser, f"{B}f{SEP}{PARIS}", "", [F]),
    (DeepSeekParser, f"{B}a b{SEP}{PARIS}{E}", f"{B}a b{SEP}{PARIS}{E}", []),
]


@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES)
def test_calls_of_a_text(parser: type[ToolParser], text: str, content: str, calls: Calls) -> None:
    assert read(parser(NAMES), [text]) == (content, calls)
    assert read(parser(NAMES), list(text)) == (content, calls)


@st.composite
def texts_in_pieces(draw: st.DrawFn) -> tuple[type[ToolParser], list[str]]:
    """A text made of well-formed and broken parts, cut anywhere."""
    parser = draw(st.sampled_from([HermesParser, BareParser, MistralParser, DeepSeekParser]))
    whole = [text for kind, text, _, _ in CASES if kind is parser]
    signs = [" ", "\n", "x", "{", "}", "[", "]", '"', "`", "```", "<", "\\", ";", ",", ":", "5", "null"]
    tags = [
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
        "</tool_call>",
        "[ARGS]",
        ALL,
        B,
        SEP,
        E,
    ]
    parts = st.sampled_from([*whole, *signs, *tags, "[TOOL_CALLS]", "<|python_tag|>"])
    text = "".join(draw(st.lists(parts, max_size=6)))
    start = draw(st.integers(0, len(text)))
    text = text[start : draw(st.integers(start, len(text)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return parser, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(texts_in_pieces())
def test_any_split_reads_as_the_whole(case: tuple[type[ToolParser], list[str]]) -> None:
    parser, pieces = case
    whole = read(parser(NAMES), ["".join(pieces)])
    assert read(parser(NAMES), pieces) == whole
    assert read(parser(NAMES), list("".join(pieces))) == whole


@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)),
    st.sampled_from([HermesParser, BareParser, MistralParser, DeepSeekParser]),
)
def test_arguments_arrive_as_they_were_written(value: dict[str, object], parser: type[ToolParser]) -> None:
    arguments = json.dumps(value, ensure_ascii=False)
    written = {
        HermesParser: hermes("f", arguments),
        BareParser: f'{{"name": "f", "parameters": {arguments}}}',
        MistralParser: f"[TOOL_CALLS]f[ARGS]{arguments}",
        DeepSeekParser: ALL + deepseek("f", arguments) + ALL_END,
    }[parser]
    assert read(parser(NAMES), [written]) == ("", [("f", arguments)])


def test_name_comes_first_and_arguments_as_they_are_written() -> None:
    text = ChatText(None, HermesParser(NAMES))
    deltas = [delta for character in hermes("f", PARIS) for delta in text.feed(character)]
    first, *rest = [delta["tool_calls"][0] for delta in deltas]
    assert first["function"] == {"name": "f", "arguments": "{"}
    assert first["id"].startswith("call_")
    assert len(first["id"]) == 5 + 24
    assert {"index": 0, "function": {"arguments": "P"}} in rest
    assert len(rest) == len(PARIS) - 1


def test_calls_past_the_limit_are_dropped() -> None:
    text = f"{hermes(*F)}\n{hermes(*G)} and more"
    assert read(HermesParser(NAMES, 1), [text]) == ("", [F])
    assert read(HermesParser(NAMES, 1), list(text)) == ("", [F])


def test_calls_inside_thoughts_are_thoughts() -> None:
    written = hermes(*F)
    text = ChatText(ReasoningParser(Tags("<think>", "</think>"), opened=False), HermesParser(NAMES))
    for character in f"<think>\nMaybe {written}?\n</think>\n\nYes. {hermes(*G)}":
        text.feed(character)
    text.finish("stop")
    message = text.message()
    assert message["reasoning_content"] == f"Maybe {written}?"
    assert message["content"] == "Yes."
    assert [(call.name, "".join(call.arguments)) for call in text.calls] == [G]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{'<｜tool▁call▁begin｜>'}}", "deepseek"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<tools></tools> <tool_call>", "hermes"),
        ('Respond in the format {"name": function name, "parameters": dictionary}', "llama3"),
        ("<|python_tag|>", "llama3"),
        ("{{ message.content }}", "json"),
    ],
)
def test_form_is_read_from_the_template(template: str, name: str) -> None:
    assert choose_form("auto", template).name == name


def test_form_by_name() -> None:
    assert [choose_form(name, "").name for name in TOOL_PARSERS] == list(TOOL_PARSERS)
    assert choose_form("hermes", "[TOOL_CALLS]").name == "hermes"
    assert choose_form("mistral", "[TOOL_CALLS][ARGS]").wrapping.start == ""
    assert choose_form("mistral", "[TOOL_CALLS]").wrapping.end == "]"
    assert "```" in choose_form("deepseek", "```json").wrapping.before
    assert "```" not in choose_form("deepseek", "").wrapping.before


CUT: list[tuple[type[ToolParser], str, str, Calls]] = [
    # On its way to be a call: its text is nobody's.
    (BareParser, '{"name": "f", "argu', "", []),
    (BareParser, '{"name": "', "", []),
    (BareParser, '{"name"', "", []),
    (BareParser, f'{{"name": "f", "parameters": {PARIS}}}\n{{"name": "g"', "", [F]),
    (BareParser, 'Well:\n```json\n{"name": "f",', "Well:\n", []),
    (HermesParser, '<tool_call>\n{"name": "f", "argu', "", []),
    (BareParser, '{"name": "f", "arguments": {"city": "Pa', "", [("f", '{"city": "Pa')]),
    # Anything else is content.
    (BareParser, '{"name": "Jo', '{"name": "Jo', []),
    (BareParser, '{"na', '{"na', []),
    (BareParser, '{"age": 3, "na', '{"age": 3, "na', []),
    (BareParser, f'{{"name": "f", "parameters": {PARIS}}}\n```json', "```json", [F]),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CUT)
def test_texts_that_were_cut(kind: type[ToolParser], text: str, content: str, calls: Calls) -> None:
    assert read(kind(NAMES), [text], "length") == (content, calls)
    assert read(kind(NAMES), list(text), "length") == (content, calls)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (BareParser, '{"na'),
        (BareParser, '{"name": "f", "argu'),
        (HermesParser, "<tool"),
        (HermesParser, "<tool_call>"),
        (HermesParser, '<tool_call>\n{"name": "f", "argu'),
        (MistralParser, "[TOOL_CALLS] [{"),
    ],
)
def test_an_answer_of_nothing_but_calls_has_no_content(kind: type[ToolParser], text: str) -> None:
    assert read(kind(NAMES, None, True), list(text), "length") == ("", [])

"""What a chat template says of its model: tools, roles, ids, thoughts, and the tokens that parsers must see."""

from __future__ import annotations

import pytest
from chat_engine import TEMPLATE, TOKENIZER
from chat_live import TEMPLATES

from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.chat_format import ChatFormat
from tokenmill.server.errors import ApiError

TOY = Tokenizer(TOKENIZER)


def style(name: str | None = None, parser: str = "auto") -> ChatFormat:
    template = None if name is None else (TEMPLATES / f"{name}.jinja").read_text()
    return ChatFormat(TOY, template, parser)


@pytest.mark.parametrize(
    ("name", "form", "tools", "system", "developer", "none", "short"),
    [
        (None, "json", False, True, False, False, False),
        ("hermes", "hermes", True, True, False, False, False),
        ("mistral", "mistral", True, True, False, False, True),
        ("no_system", "json", False, False, False, False, False),
        ("thinking", "json", False, True, False, False, False),
    ],
)
def test_what_templates_know(
    name: str | None, form: str, tools: bool, system: bool, developer: bool, none: bool, short: bool
) -> None:
    found = style(name)
    assert found.form.name == form
    assert (found.knows_tools, found.knows_system, found.knows_developer) == (tools, system, developer)
    assert (found.wants_none, found.short_ids) == (none, short)
    assert (found.tags is not None) == (name == "thinking")


def test_what_a_templates_text_shows() -> None:
    assert ChatFormat(TOY, "{% if message['content'] is none %}{% endif %}", "auto").wants_none
    assert ChatFormat(TOY, "{% if message.role == 'developer' %}{% endif %}", "auto").knows_developer


def test_named_parser_wins_over_the_template() -> None:
    assert style("hermes", "mistral").form.name == "mistral"
    assert style(None, "deepseek").form.name == "deepseek"


def test_broken_template_is_a_refusal() -> None:
    broken = ChatFormat(TOY, "{% for %}", "auto")
    with pytest.raises(ApiError, match="compiled") as caught:
        broken.render([{"role": "user", "content": "a"}])
    assert caught.value.status == 400


def test_markup_is_shown_only_to_those_who_read_it() -> None:
    ids = TOY.encode("<s>a<|python_tag|>b[TOOL_CALLS]c<think>d", add_special_tokens=False)
    assert TOY.decode(ids) == "abcd"
    assert style(None).tokenizer(with_tools=True).decode(ids) == "a<|python_tag|>bcd"
    assert style("mistral").tokenizer(with_tools=True).decode(ids) == "ab[TOOL_CALLS]cd"
    assert style("mistral").tokenizer(with_tools=False).decode(ids) == "abcd"
    assert style("thinking").tokenizer(with_tools=False).decode(ids) == "abc<think>d"
    # The tokenizer itself is as it was.
    assert TOY.decode(ids) == "abcd"
    assert TOY.info.chat_template == TEMPLATE

"""The forms in which models write tool calls: how each is recognised, read, and enforced."""

from __future__ import annotations

import re

import msgspec

from tokenmill.server.tool_bare import BareParser
from tokenmill.server.tool_markers import DeepSeekParser, HermesParser, MistralParser
from tokenmill.server.tool_parser import ToolParser
from tokenmill.server.tool_tags import PAIR_TAGS


class Wrapping(msgspec.Struct, frozen=True, kw_only=True):
    """The text around the calls of an answer; `{name}` is the function's, its arguments follow `before`."""

    start: str = ""
    before: str
    after: str
    between: str = ""
    end: str = ""


class ToolForm(msgspec.Struct, frozen=True, kw_only=True):
    """One form of tool calls."""

    name: str
    parser: type[ToolParser]
    markers: tuple[str, ...] = ()
    """What may be tokens of their own, which the parser must see as text."""
    opening: str | None = None
    """What stands before calls and before nothing else."""
    closing: str | None = None
    """What stands behind each call and behind nothing else."""
    wrapping: Wrapping
    text_arguments: bool = False
    """Whether templates want the arguments of earlier calls as text, not as an object."""


_OBJECT = '{"name": "{name}", "arguments": '

HERMES = ToolForm(
    name="hermes",
    parser=HermesParser,
    markers=(HermesParser.OPEN, HermesParser.CLOSE, *PAIR_TAGS),
    opening=HermesParser.OPEN,
    closing=HermesParser.CLOSE,
    wrapping=Wrapping(before=f"<tool_call>\n{_OBJECT}", after="}\n</tool_call>", between="\n"),
)
LLAMA3 = ToolForm(
    name="llama3",
    parser=BareParser,
    markers=(BareParser.TAG,),
    wrapping=Wrapping(before='{"name": "{name}", "parameters": ', after="}", between="; "),
)
MISTRAL = ToolForm(
    name="mistral",
    parser=MistralParser,
    markers=(MistralParser.OPEN, MistralParser.ARGUMENTS, MistralParser.IDENTIFIER),
    opening=MistralParser.OPEN,
    wrapping=Wrapping(before="[TOOL_CALLS]{name}[ARGS]", after=""),
)
MISTRAL_LIST = ToolForm(
    name="mistral",
    parser=MistralParser,
    markers=(MistralParser.OPEN,),
    opening=MistralParser.OPEN,
    wrapping=Wrapping(start="[TOOL_CALLS] [", before=_OBJECT, after="}", between=", ", end="]"),
)
_DEEPSEEK_MARKERS = (
    DeepSeekParser.ALL,
    DeepSeekParser.ALL_END,
    DeepSeekParser.OPEN,
    DeepSeekParser.SEPARATOR,
    DeepSeekParser.CLOSE,
)
DEEPSEEK = ToolForm(
    name="deepseek",
    parser=DeepSeekParser,
    markers=_DEEPSEEK_MARKERS,
    opening=DeepSeekParser.ALL,
    closing=DeepSeekParser.CLOSE,
    wrapping=Wrapping(
        start=DeepSeekParser.ALL,
        before=f"{DeepSeekParser.OPEN}{{name}}{DeepSeekParser.SEPARATOR}",
        after=DeepSeekParser.CLOSE,
        end=DeepSeekParser.ALL_END,
    ),
    text_arguments=True,
)
DEEPSEEK_FENCED = msgspec.structs.replace(
    DEEPSEEK,
    wrapping=Wrapping(
        start=DeepSeekParser.ALL,
        before=f"{DeepSeekParser.OPEN}function{DeepSeekParser.SEPARATOR}{{name}}\n```json\n",
        after=f"\n```{DeepSeekParser.CLOSE}",
        between="\n",
        end=DeepSeekParser.ALL_END,
    ),
)
JSON = ToolForm(
    name="json",
    parser=BareParser,
    markers=(BareParser.TAG,),
    wrapping=Wrapping(before=_OBJECT, after="}", between="\n"),
)


def choose_form(name: str, template: str) -> ToolForm:
    """The form of this name; for `auto` the one that a chat template's text shows its model to write."""
    if name == "auto":
        name = _detect(template)
    if name == "mistral":
        return MISTRAL if MistralParser.ARGUMENTS in template else MISTRAL_LIST
    if name == "deepseek":
        return DEEPSEEK_FENCED if "```json" in template else DEEPSEEK
    return {"hermes": HERMES, "llama3": LLAMA3}.get(name, JSON)


def _detect(template: str) -> str:
    if DeepSeekParser.OPEN in template:
        return "deepseek"
    if MistralParser.OPEN in template:
        return "mistral"
    if HermesParser.OPEN in template:
        return "hermes"
    if BareParser.TAG in template or re.search(r'"name":.{0,80}"parameters":', template):
        return "llama3"
    return "json"

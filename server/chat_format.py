"""How one model chats: what its template knows of, and in which markup the model answers.

All of it is read from the template: from its text, or by rendering small conversations and looking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.errors import ApiError, bad_request
from tokenmill.server.reasoning import find_tags
from tokenmill.server.tool_forms import ToolForm, choose_form

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}
_HELLO = [{"role": "user", "content": "hello"}]


class ChatFormat:
    """One model's way to chat. `ApiError` 400 where it has no template, or a broken one."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, tool_parser: str) -> None:
        """`template`: replaces the model's own; `tool_parser`: a form's name, or `auto`."""
        if template is not None:
            tokenizer = tokenizer.view(chat_template=template)
        source = tokenizer.info.chat_template
        if source is None:
            message = "this model has no chat template; POST /v1/completions takes its prompts"
            raise bad_request(message, "messages")
        self._tokenizer = tokenizer
        self.source = source
        self.tags = find_tags(source)
        """What stands around the model's thoughts, if it thinks aloud."""
        name = tool_parser if tool_parser != "auto" or self.knows_tools else "json"
        self.form: ToolForm = choose_form(name, source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. `ApiError` 400 with the template's own words when it refuses."""
        try:
            template = self._tokenizer.chat_template
            assert template is not None
            return template.render(messages, tools, add_generation_prompt, **(variables or {}))
        except ValueError as error:
            raise bad_request(str(error), "messages") from None

    def tokenizer(self, with_tools: bool) -> Tokenizer:
        """What decodes answers: it shows the markup of calls and thoughts that are special tokens."""
        return self._with_tools if with_tools else self._without_tools

    @cached_property
    def _with_tools(self) -> Tokenizer:
        return self._showing(self.form.markers)

    @cached_property
    def _without_tools(self) -> Tokenizer:
        return self._showing(())

    def _showing(self, markers: Sequence[str]) -> Tokenizer:
        if self.tags is not None:
            markers = [*markers, self.tags.open, self.tags.close]
        encoded = self._tokenizer.encode_batch(markers, add_special_tokens=False) if markers else []
        visible = {ids[0] for ids in encoded if len(ids) == 1} & self._tokenizer.special_ids
        return self._tokenizer.view(visible=visible) if visible else self._tokenizer

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes tools into the prompt."""
        return self._differs(_HELLO, _HELLO, tools=[_PROBE_TOOL])

    @cached_property
    def knows_system(self) -> bool:
        """Whether it takes a system message."""
        return self._differs([{"role": "system", "content": "probe"}, *_HELLO], _HELLO)

    @cached_property
    def knows_developer(self) -> bool:
        """Whether it has a role of its own for the developer."""
        return "developer" in self.source

    @cached_property
    def wants_none(self) -> bool:
        """Whether it tells calls from text by a content that is none."""
        return re.search(r"content['\"]?\]?\s+is\s+(not\s+)?none", self.source) is not None

    @cached_property
    def short_ids(self) -> bool:
        """Whether it insists on ids of nine characters for calls, as Mistral's do."""
        return re.search(r"id\s*\|\s*length\s*!=\s*9", self.source) is not None

    def _differs(
        self,
        left: Sequence[Mapping[str, Any]],
        right: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> bool:
        try:
            return self.render(left, tools) != self.render(right)
        except ApiError:
            return False

"""Messages as a chat template reads them, and tools for templates that know none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tokenmill.server.chat_format import ChatFormat
from tokenmill.server.chat_protocol import Message, ToolCall
from tokenmill.server.errors import bad_request, shorten
from tokenmill.server.tool_protocol import ToolSet

TemplateMessage = dict[str, Any]

INTRODUCTION = """You can call these functions, one JSON object a line:
{tools}
To call one, write just a line like this, and its result will follow:
{{"name": "function_name", "arguments": {{"argument": "value"}}}}{several}"""
SEVERAL = "\nTo call several, write one such line for each."
RESULT = "Result of {name}:\n{content}"


def template_messages(
    messages: Sequence[Message], style: ChatFormat, tools: ToolSet | None
) -> list[TemplateMessage]:
    """The conversation for a template; for one that knows no tools, calls and results become plain text."""
    plain_tools = not style.knows_tools
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    converted: list[TemplateMessage] = []
    results: TemplateMessage | None = None
    for number, message in enumerate(messages):
        if plain_tools and message.role == "tool":
            name = names.get(message.tool_call_id or "", message.name or "the call")
            text = RESULT.format(name=name, content=message.content)
            # Results of one turn's calls stand in one message: user and assistant are to take turns.
            if results is not None:
                results["content"] += "\n\n" + text
            else:
                results = {"role": "user", "content": text}
                converted.append(results)
            continue
        results = None
        if plain_tools and message.tool_calls:
            converted.append({"role": "assistant", "content": _written_calls(message)})
        else:
            converted.append(_converted(message, style, f"messages.{number}"))
    if tools is not None and plain_tools:
        _introduce(converted, style, tools)
    return converted


def _written_calls(message: Message) -> str:
    """An assistant's calls in the generic form, as it would have written them."""
    lines = [message.content] if message.content else []
    for call in message.tool_calls or ():
        lines.append(
            f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments or "{}"}}}'
        )
    return "\n".join(lines)


def _converted(message: Message, style: ChatFormat, where: str) -> TemplateMessage:
    role = "system" if message.role == "developer" and not style.knows_developer else message.role
    content = message.content if message.content is not None else message.refusal
    if content is None and not style.wants_none:
        content = ""
    converted: TemplateMessage = {"role": role, "content": content}
    for field in ("name", "reasoning_content"):
        if getattr(message, field) is not None:
            converted[field] = getattr(message, field)
    if message.tool_call_id is not None:
        converted["tool_call_id"] = _call_id(message.tool_call_id, style)
    if message.tool_calls:
        converted["tool_calls"] = [
            _call(call, style, f"{where}.tool_calls.{number}")
            for number, call in enumerate(message.tool_calls)
        ]
    return converted


def _call(call: ToolCall, style: ChatFormat, where: str) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if not style.form.text_arguments:
        arguments = _parsed(arguments, where)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": _call_id(call.id, style), "type": "function", "function": function}


def _parsed(arguments: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        message = f"{where}.function.arguments must be the JSON of an object, not {shorten(arguments)}"
        raise bad_request(message, "messages")
    return parsed


def _call_id(identifier: str, style: ChatFormat) -> str:
    if not style.short_ids or (len(identifier) == 9 and identifier.isalnum()):
        return identifier
    return hashlib.sha256(identifier.encode()).hexdigest()[:9]


def _introduce(converted: list[TemplateMessage], style: ChatFormat, tools: ToolSet) -> None:
    """Put the definitions into the system message, or before the first message where there can't be one."""
    definitions = [tool.function.definition()["function"] for tool in tools.tools]
    lines = [json.dumps(definition, ensure_ascii=False) for definition in definitions]
    text = INTRODUCTION.format(tools="\n".join(lines), several=SEVERAL if tools.parallel else "")
    first = converted[0]
    if first["role"] == "system":
        first["content"] = f"{first['content']}\n\n{text}"
    elif not style.knows_system:
        first["content"] = f"{text}\n\n{first['content']}"
    else:
        converted.insert(0, {"role": "system", "content": text})

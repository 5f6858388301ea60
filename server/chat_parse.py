"""A chat request's body, checked: each message by its role, and everything else as for completions."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tokenmill.server.body import decode_object, without_nulls
from tokenmill.server.chat_protocol import ChatRequest, Message
from tokenmill.server.errors import bad_request, shorten
from tokenmill.server.parse import check_conflicts, check_speech, merge_extra_params, validated
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.protocol_sampling import SamplingFields
from tokenmill.server.tool_protocol import ToolSet, read_tools

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
MAX_VARIABLES = 16
RESERVED = frozenset(
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"]
    + ["raise_exception", "strftime_now", "dict", "namespace", "range", "lipsum", "cycler", "joiner"]
    + ["loop", "caller", "varargs", "kwargs", "self", "true", "false", "none", "True", "False", "None"]
    + [f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
)
"""Names in a template that a request may not give a value."""

_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_CHAT_ONLY = frozenset(
    ["tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort"]
)
"""Fields whose meaning is in the prompt that the template writes."""


class ChatInput(msgspec.Struct, frozen=True):
    """What a chat request asks for."""

    messages: list[Message]
    tools: ToolSet | None
    variables: dict[str, Any]
    """Given to the chat template."""
    completion: CompletionRequest
    """All that isn't about the prompt, as a completion of a prompt that is still to be written."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def parse_chat(body: bytes, warn_unknown: bool = False) -> ChatInput:
    """The checked request of a body. Raises `ApiError` 400."""
    values = merge_extra_params(decode_object(body))
    for name, use in (("functions", "tools"), ("function_call", "tool_choice")):
        if name in values:
            raise bad_request(f"{name} is deprecated and not supported here; use {use}", name)
    if isinstance(values.get("messages"), list):
        values["messages"] = [_message(message) for message in values["messages"]]
    request = validated(values, ChatRequest, warn_unknown)
    completion = _completion(request)
    check_conflicts(completion)
    check_speech(completion)
    messages = [_as_text(message, f"messages.{number}") for number, message in enumerate(request.messages)]
    for number, message in enumerate(messages):
        _check_message(message, f"messages.{number}")
    request = request.model_copy(update={"messages": messages})
    _check_continuation(request)
    return ChatInput(
        messages,
        read_tools(request),
        template_variables(request),
        completion,
        add_generation_prompt=request.add_generation_prompt is not False
        and not request.continue_final_message,
        continue_final_message=request.continue_final_message,
    )


def _message(value: object) -> object:
    """A message without its nulls, which mean "not given", and without what only streams have."""
    if not isinstance(value, dict):
        return value
    message = without_nulls(value)
    if isinstance(message.get("audio"), dict):
        message["audio"] = without_nulls(message["audio"])
    if "function_call" in message:
        given = "messages: function_call is deprecated and not supported here; use tool_calls"
        raise bad_request(given, "messages")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    return message


def _as_text(message: Message, where: str) -> Message:
    """A spoken answer by its transcript. Raises `ApiError` 400 for one that is only named: none is kept."""
    if message.audio is None or message.content is not None or message.role != "assistant":
        return message
    if message.audio.transcript is None:
        raise bad_request(f"{where}: no audio is kept here; send its transcript, or content", "messages")
    return message.model_copy(update={"content": message.audio.transcript})


def _completion(request: ChatRequest) -> CompletionRequest:
    """The same request with a prompt that is still to be written; its values are checked already."""
    names = (set(CompletionRequest.model_fields) & set(ChatRequest.model_fields)) - _CHAT_ONLY
    values = {name: getattr(request, name) for name in names}
    given = request.model_fields_set & names
    return CompletionRequest.model_construct(given, prompt=[""], **values)


def _check_message(message: Message, where: str) -> None:
    """What a message of its role must and can't have. Raises `ApiError` 400."""
    given = message.model_fields_set
    for field, role in (
        ("tool_calls", "assistant"),
        ("refusal", "assistant"),
        ("audio", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if field in given and message.role != role:
            raise bad_request(f"{where}: {field} belongs to the role {role}, not {message.role}", "messages")
    if message.role == "tool" and message.tool_call_id is None:
        raise bad_request(f"{where}: a tool's message needs tool_call_id", "messages")
    if message.content is None and not (message.tool_calls or message.refusal is not None):
        raise bad_request(f"{where}: content is required for the role {message.role}", "messages")


def _check_continuation(request: ChatRequest) -> None:
    if not request.continue_final_message:
        return
    if request.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt can't both be true", "add_generation_prompt"
        )
    final = request.messages[-1]
    if final.role != "assistant" or final.content is None or final.tool_calls:
        message = "continue_final_message needs an assistant's text as the last message"
        raise bad_request(message, "continue_final_message")


def template_variables(request: SamplingFields) -> dict[str, Any]:
    """What `chat_template_kwargs` and `reasoning_effort` give to the template. Raises `ApiError` 400."""
    variables = dict(request.chat_template_kwargs or {})
    param = "chat_template_kwargs"
    if len(variables) > MAX_VARIABLES:
        raise bad_request(f"{param} may have {MAX_VARIABLES} keys at the most, not {len(variables)}", param)
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name) or name in RESERVED:
            raise bad_request(f"{param}: {shorten(name)} can't be set", param)
        if value is not None and not isinstance(value, str | int | float):
            given = shorten(value)
            raise bad_request(f"{param}: {name} must be a text, a number or a bool, not {given}", param)
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in EFFORTS:
            allowed = ", ".join(EFFORTS)
            message = f"reasoning_effort must be one of {allowed}, not {shorten(effort)}"
            raise bad_request(message, "reasoning_effort")
        variables.setdefault("reasoning_effort", effort)
    return variables

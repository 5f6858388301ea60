"""The chat request: messages, and the fields that it has beside those of every generating request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from tokenmill.server.errors import shorten
from tokenmill.server.fields import refused
from tokenmill.server.protocol_parts import Strict
from tokenmill.server.protocol_sampling import INT31, SamplingFields

TEXT_KEYS = {"text": "text", "refusal": "refusal"}
"""Kinds of content parts that are text, and the key that holds it."""


def _content(value: object) -> str:
    """A message's content as one text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise refused(f"must be a string or a list of text parts, not {shorten(value)}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        key = TEXT_KEYS.get(kind) if isinstance(kind, str) else None
        if not isinstance(part, dict) or key is None:
            given = f"the type {shorten(kind)}" if kind is not None else shorten(part)
            raise refused(f"only parts of the type text are understood here, not {given}")
        if set(part) != {"type", key} or not isinstance(part[key], str):
            raise refused(f'a text part is {{"type": "text", "text": string}}, not {shorten(part)}')
        texts.append(part[key])
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    PlainValidator(_content, json_schema_input_type=Any),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}),
]


class CalledFunction(Strict):
    """The function that an earlier answer called."""

    name: str = Field(min_length=1, max_length=128, description="Its name.", examples=["get_weather"])
    arguments: str = Field(description="Its arguments, as JSON text.", examples=['{"city": "Paris"}'])


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str = Field(min_length=1, max_length=256, description="The call's id.", examples=["call_1"])
    type: Literal["function"] = Field("function", description="Always `function`.", examples=["function"])
    function: CalledFunction = Field(
        description="What was called.", examples=[{"name": "get_weather", "arguments": "{}"}]
    )
    index: int | None = Field(None, description="Accepted, as streams have it.", examples=[0])


class PastAudio(Strict):
    """The sound of an earlier answer. Only its transcript says anything to a model that reads text."""

    id: str | None = Field(
        None, max_length=256, description="Accepted: no sound is kept here.", examples=["audio_1"]
    )
    transcript: str | None = Field(
        None,
        description="What was said; stands for the `content` that such an answer hasn't.",
        examples=["Paris."],
    )
    data: str | None = Field(None, description="Accepted without effect.", examples=[None])
    expires_at: int | None = Field(None, ge=0, description="Accepted without effect.", examples=[1767225600])


class Message(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Content | None = Field(
        None,
        description="What is said: text, or a list of text parts. Only an assistant who calls tools may do "
        "without.",
        examples=["What is the capital of France?"],
    )
    name: str | None = Field(None, max_length=256, description="The speaker's name.", examples=["ann"])
    tool_calls: list[ToolCall] | None = Field(
        None,
        min_length=1,
        max_length=128,
        description="An assistant's calls.",
        examples=[[{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]],
    )
    tool_call_id: str | None = Field(
        None, max_length=256, description="The call that a tool's message answers.", examples=["call_1"]
    )
    refusal: str | None = Field(None, description="An assistant's refusal.", examples=["No."])
    audio: PastAudio | None = Field(
        None,
        description="The sound of an assistant's earlier answer, with its transcript.",
        examples=[{"id": "audio_1", "transcript": "Paris."}],
    )
    reasoning_content: str | None = Field(
        None, description="An assistant's thoughts; templates may leave them out.", examples=["Hm."]
    )


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        description="The conversation, rendered with the model's chat template.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens.", examples=[True])
    top_logprobs: int = Field(0, ge=0, le=20, description="Alternatives with `logprobs`.", examples=[5])
    add_generation_prompt: bool | None = Field(
        None,
        description="Whether the prompt ends with the beginning of an assistant's message. True unless "
        "`continue_final_message` is.",
        examples=[True],
    )
    continue_final_message: bool = Field(
        False,
        description="Whether the answer continues the last message, an assistant's, instead of following it.",
        examples=[False],
    )
    add_special_tokens: bool = Field(
        False,
        description="Add BOS and the like to the rendered text. Templates write them themselves; they are "
        "never added twice.",
        examples=[False],
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, lt=INT31, description="Keep the last that many tokens of the prompt.", examples=[1024]
    )

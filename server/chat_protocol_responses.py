"""The shapes of chat answers, for the OpenAPI document. `chat_answer.py` writes the answers themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from tokenmill.server.protocol_responses import ContentLogprob, ToolCallAnswer, Usage


class ChatMessageAnswer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null where the model only calls functions.")
    refusal: None = None
    reasoning_content: str | None = Field(None, description="What the model thought before, if it did.")
    tool_calls: list[ToolCallAnswer] | None = None


class ChatLogprobs(BaseModel):
    """One item for each token of the answer, markup and thoughts included."""

    content: list[ContentLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessageAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    """The answer to a conversation. A stream's chunks have `delta` in the place of `message`."""

    id: str = Field(examples=["chatcmpl-0b8f0c5a4f5d4d6c8a1f7e3b2c9d0e1f"])
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None

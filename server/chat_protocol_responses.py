"""The shapes of chat answers, for the OpenAPI document. `chat_answer.py` writes the answers themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from tokenmill.server.protocol_responses import (
    AUDIO,
    CALLS,
    CREATED,
    FINGERPRINT,
    FINISH,
    INDEX,
    MODEL,
    PROMPT_IDS,
    PROMPT_LOGPROBS,
    TOKEN_IDS,
    TOKENS,
    USAGE,
    ContentLogprob,
    SpokenAudio,
    ToolCallAnswer,
    Usage,
)


class ChatMessageAnswer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    content: str | None = Field(
        description="What the model says; null where it only calls functions, or where `audio` says it.",
        examples=["The capital of France is Paris."],
    )
    refusal: None = Field(None, description="Always null.", examples=[None])
    reasoning_content: str | None = Field(
        None, description="What the model thought before, if it did.", examples=["Let me see."]
    )
    tool_calls: list[ToolCallAnswer] | None = Field(
        None, description="The functions that it calls.", examples=[CALLS]
    )
    audio: SpokenAudio | None = Field(
        None,
        description="With `audio` among the `modalities`: what the model says, spoken; null where it says nothing.",
        examples=[AUDIO],
    )


class ChatLogprobs(BaseModel):
    """One item for each token of the answer, markup and thoughts included."""

    content: list[ContentLogprob] = Field(
        description="The tokens with their alternatives.", examples=[[{**TOKENS, "top_logprobs": []}]]
    )
    refusal: None = Field(None, description="Always null.", examples=[None])


class ChatChoice(BaseModel):
    """One answer."""

    index: int = INDEX
    message: ChatMessageAnswer = Field(
        description="The answer.",
        examples=[{"role": "assistant", "content": "The capital of France is Paris.", "refusal": None}],
    )
    logprobs: ChatLogprobs | None = Field(
        None, description="With `logprobs`: those of all tokens.", examples=[None]
    )
    finish_reason: Literal["stop", "length", "tool_calls"] = FINISH
    token_ids: list[int] | None = TOKEN_IDS


class ChatResponse(BaseModel):
    """The answer to a conversation. A stream's chunks have `delta` in the place of `message`."""

    id: str = Field(
        description="Made by the server; the same in all chunks of a stream.",
        examples=["chatcmpl-0b8f0c5a4f5d4d6c8a1f7e3b2c9d0e1f"],
    )
    object: Literal["chat.completion"] = Field(
        description="`chat.completion.chunk` in a stream.", examples=["chat.completion"]
    )
    created: int = CREATED
    model: str = MODEL
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice] = Field(
        description="As many answers as `n`.",
        examples=[
            [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "The capital of France is Paris."},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
        ],
    )
    usage: Usage = Field(description="What was used.", examples=[USAGE])
    prompt_token_ids: list[int] | None = PROMPT_IDS
    prompt_logprobs: list[dict[str, Any] | None] | None = PROMPT_LOGPROBS

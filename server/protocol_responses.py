"""The shapes of answers, for the OpenAPI document. Answers themselves are written by `answer.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class TokenLogprob(BaseModel):
    """A token, its log-probability and its exact bytes."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ContentLogprob(TokenLogprob):
    """A token of the text with the likeliest alternatives at its place."""

    top_logprobs: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    """Legacy arrays, one item a token; `content` where `logprobs` was `true`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token starts, in characters of the returned text.")
    content: list[ContentLogprob] | None = None
    refusal: None = None


class CalledFunctionAnswer(BaseModel):
    """The function that the model calls."""

    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCallAnswer(BaseModel):
    """One call."""

    id: str = Field(examples=["call_4f1bQxGd0vT7mYc2LkZs9eWa"])
    type: Literal["function"]
    function: CalledFunctionAnswer


class CompletionChoice(BaseModel):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    tool_calls: list[ToolCallAnswer] | None = Field(None, description="With `tools`: the calls.")
    reasoning_content: str | None = Field(None, description="With `tools`: what stood between thinking tags.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, object] | None] | None = None


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """What completion tokens were."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int
    audio_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and all candidates."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class CompletionResponse(BaseModel):
    """The answer; a stream's chunks have the same shape."""

    id: str = Field(examples=["cmpl-0b8f0c5a4f5d4d6c8a1f7e3b2c9d0e1f"])
    object: Literal["text_completion", "chat.completion"] = Field(
        description="`chat.completion` where the prompt went through a chat template: with `tools`."
    )
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ErrorBody(BaseModel):
    """What was wrong, what was given, what is allowed."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer other than 200."""

    error: ErrorBody

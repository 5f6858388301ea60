"""The shapes of the editors' answers, for the OpenAPI document. `fim_answers.py` writes the answers themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenmill.server.protocol_responses import CREATED, MODEL


class FimMessage(BaseModel):
    """What was filled in."""

    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    content: str = Field(description="The text between prompt and suffix.", examples=["a + b"])
    tool_calls: None = Field(None, description="Always null.", examples=[None])


class FimChoice(BaseModel):
    """The one choice of the answer; in a stream `delta` stands for `message`."""

    index: int = Field(description="Always 0.", examples=[0])
    message: FimMessage = Field(
        description="The text, as an assistant's message.",
        examples=[{"role": "assistant", "content": "a + b"}],
    )
    finish_reason: Literal["stop", "length"] | None = Field(
        description="`stop`: the model's end or a stop. `length`: the token limit.", examples=["stop"]
    )


class FimUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int = Field(description="Tokens of prompt and suffix.", examples=[20])
    completion_tokens: int = Field(description="Tokens of the text.", examples=[4])
    total_tokens: int = Field(description="Both together.", examples=[24])


class FimResponse(BaseModel):
    """The answer, in the shape of a chat completion."""

    id: str = Field(description="Made by the server.", examples=["cmpl-0b8f0c5a4f5d4d6c8a1f7e3b2c9d0e1f"])
    object: Literal["chat.completion"] = Field(
        description="`chat.completion.chunk` in a stream.", examples=["chat.completion"]
    )
    created: int = CREATED
    model: str = MODEL
    choices: list[FimChoice] = Field(
        description="One choice.",
        examples=[
            [{"index": 0, "message": {"role": "assistant", "content": "a + b"}, "finish_reason": "stop"}]
        ],
    )
    usage: FimUsage = Field(
        description="What was used; in a stream on the last chunk.",
        examples=[{"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}],
    )


TIMINGS = {
    "prompt_n": 20,
    "prompt_ms": 40.0,
    "prompt_per_token_ms": 2.0,
    "prompt_per_second": 500.0,
    "predicted_n": 4,
    "predicted_ms": 40.0,
    "predicted_per_token_ms": 10.0,
    "predicted_per_second": 100.0,
}


class InfillTimings(BaseModel):
    """Tokens and milliseconds of the prompt and of the text."""

    prompt_n: int = Field(description="Prompt tokens that had to be computed.", examples=[20])
    prompt_ms: float = Field(description="From arrival to the first token.", examples=[40.0])
    prompt_per_token_ms: float = Field(description="That, for each token.", examples=[2.0])
    prompt_per_second: float = Field(description="Prompt tokens a second.", examples=[500.0])
    predicted_n: int = Field(description="Generated tokens.", examples=[4])
    predicted_ms: float = Field(description="From the first token to the last.", examples=[40.0])
    predicted_per_token_ms: float = Field(description="That, for each token.", examples=[10.0])
    predicted_per_second: float = Field(description="Generated tokens a second.", examples=[100.0])


class InfillResponse(BaseModel):
    """The answer; a stream's events have the first fields, its last one has all.

    With `response_fields` it has only those.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))

    index: int = Field(description="Always 0.", examples=[0])
    content: str = Field(description="The text; in a stream what is new of it.", examples=["a + b"])
    tokens: list[int] = Field(description="Its ids, with `return_tokens`.", examples=[[81, 1232, 303]])
    stop: bool = Field(description="Whether this is the last event.", examples=[True])
    id_slot: int = Field(description="Always -1: there are no slots.", examples=[-1])
    model: str = MODEL
    tokens_predicted: int = Field(description="Generated tokens.", examples=[4])
    tokens_evaluated: int = Field(description="Tokens of the prompt.", examples=[20])
    tokens_cached: int = Field(description="Of those, what earlier prompts had computed.", examples=[0])
    truncated: bool = Field(
        description="Always false: a prompt that doesn't fit is refused.", examples=[False]
    )
    stop_type: Literal["none", "eos", "limit", "word"] = Field(
        description="What ended the text: the model, a limit, a stop.", examples=["eos"]
    )
    stopping_word: str = Field(description="The stop, where only one was given.", examples=[""])
    has_new_line: bool = Field(description="Whether the text has a line's end.", examples=[False])
    timings: InfillTimings = Field(description="How long it took.", examples=[TIMINGS])

"""The shapes of answers, for the OpenAPI document. Answers themselves are written by `answer.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

INDEX = Field(
    description="Its place among all choices: choice `i` of prompt `p` has `p * n + i`.", examples=[0]
)
CREATED = Field(description="When it was answered, in seconds since 1970.", examples=[1767225600])
MODEL = Field(
    description="The name that the request asked for.", examples=["huggingfacetb/smollm2-135m-instruct"]
)
FINGERPRINT = Field(
    description="Changes with the weights, their precision, the kernels and the engine's version, and only then.",
    examples=["80046fdf0ca32236"],
)
FINISH = Field(
    description="`stop`: the model's end or a stop. `length`: the token limit. `tool_calls`: calls wait for "
    "their results. Null in a stream until the choice's last chunk.",
    examples=["stop"],
)
TOKEN_IDS = Field(
    None, description="With `return_token_ids`: the ids of the generated tokens.", examples=[[7042, 30]]
)
PROMPT_IDS = Field(
    None,
    description="With `return_token_ids`: the ids of the prompt.",
    examples=[[504, 3575, 282, 4649, 314]],
)
PROMPT_LOGPROBS = Field(
    None,
    description="With `prompt_logprobs`: for each token of the prompt, null for the first, the token and its "
    "alternatives by their ids.",
    examples=[[None, {"3575": {"logprob": -2.5, "rank": 3, "decoded_token": " capital"}}]],
)
TOKENS = {"token": " Paris", "logprob": -0.5, "bytes": [32, 80, 97, 114, 105, 115]}


class TokenLogprob(BaseModel):
    """A token, its log-probability and its exact bytes."""

    token: str = Field(
        description="The token decoded alone; U+FFFD for bytes that are no character by themselves.",
        examples=[" Paris"],
    )
    logprob: float = Field(
        description="Natural logarithm of its probability, before bias, penalties and temperature.",
        examples=[-0.5],
    )
    bytes: list[int] | None = Field(
        None, description="The token's bytes.", examples=[[32, 80, 97, 114, 105, 115]]
    )


class ContentLogprob(TokenLogprob):
    """A token of the text with the likeliest alternatives at its place."""

    top_logprobs: list[TokenLogprob] = Field(
        description="As many alternatives as were asked for, likeliest first.", examples=[[TOKENS]]
    )


class CompletionLogprobs(BaseModel):
    """Legacy arrays, one item a token; `content` where `logprobs` was `true`."""

    tokens: list[str] = Field(description="Each token decoded alone.", examples=[[" Paris", "."]])
    token_logprobs: list[float | None] = Field(
        description="Their log-probabilities; null for the first token of an echoed prompt.",
        examples=[[-0.5, -1.2]],
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens at each place, with their log-probabilities.",
        examples=[[{" Paris": -0.5}, {".": -1.2}]],
    )
    text_offset: list[int] = Field(
        description="Where each token starts, in characters of the returned text.", examples=[[0, 6]]
    )
    content: list[ContentLogprob] | None = Field(
        None,
        description="The same in the shape of chat completions.",
        examples=[[{**TOKENS, "top_logprobs": []}]],
    )
    refusal: None = Field(None, description="Always null.", examples=[None])


class CalledFunctionAnswer(BaseModel):
    """The function that the model calls."""

    name: str = Field(description="Its name.", examples=["get_weather"])
    arguments: str = Field(
        description="JSON, as the model wrote it; a beginning of it where the answer was cut by `length`.",
        examples=['{"city": "Paris"}'],
    )


class ToolCallAnswer(BaseModel):
    """One call."""

    id: str = Field(
        description="Names the call in the message that brings its result.",
        examples=["call_4f1bQxGd0vT7mYc2LkZs9eWa"],
    )
    type: Literal["function"] = Field(description="Always `function`.", examples=["function"])
    function: CalledFunctionAnswer = Field(
        description="What is called.", examples=[{"name": "get_weather", "arguments": '{"city": "Paris"}'}]
    )


CALLS = [
    {
        "id": "call_4f1bQxGd0vT7mYc2LkZs9eWa",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
]


class SpokenAudio(BaseModel):
    """A spoken answer. In a stream it comes in pieces: `id` first, `data` as it is made, `expires_at` last."""

    id: str = Field(description="Made by the server.", examples=["audio_4f1b0c9d2e8a7b6c5d4e3f21"])
    data: str = Field(
        description="The sound in the format that was asked for, as base64.", examples=["UklGRg=="]
    )
    transcript: str = Field(description="What is said.", examples=[" Paris."])
    expires_at: int = Field(
        description="Until when the server keeps it, in seconds since 1970: it doesn't, so when it was made.",
        examples=[1767225600],
    )


AUDIO = {
    "id": "audio_4f1b0c9d2e8a7b6c5d4e3f21",
    "data": "UklGRg==",
    "transcript": " Paris.",
    "expires_at": 1767225600,
}


class CompletionChoice(BaseModel):
    """One completion of one prompt."""

    index: int = INDEX
    text: str = Field(description="The completion; behind its prompt with `echo`.", examples=[" Paris."])
    logprobs: CompletionLogprobs | None = Field(
        None, description="With `logprobs`: those of the tokens of the text.", examples=[None]
    )
    finish_reason: Literal["stop", "length", "tool_calls"] | None = FINISH
    tool_calls: list[ToolCallAnswer] | None = Field(
        None, description="With `tools`: the calls.", examples=[CALLS]
    )
    audio: SpokenAudio | None = Field(
        None,
        description="With `audio` among the `modalities`: the text, spoken; null where it is empty.",
        examples=[AUDIO],
    )
    reasoning_content: str | None = Field(
        None, description="With `tools`: what stood between thinking tags.", examples=["Let me see."]
    )
    token_ids: list[int] | None = TOKEN_IDS
    prompt_token_ids: list[int] | None = PROMPT_IDS
    prompt_logprobs: list[dict[str, Any] | None] | None = PROMPT_LOGPROBS


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int = Field(description="Those that earlier prompts had computed.", examples=[0])


class CompletionTokensDetails(BaseModel):
    """What completion tokens were."""

    accepted_prediction_tokens: int = Field(
        description="Tokens of the `prediction` that became text.", examples=[0]
    )
    rejected_prediction_tokens: int = Field(
        description="Drafted tokens of the `prediction` that didn't; no completion tokens.", examples=[0]
    )
    reasoning_tokens: int = Field(description="Thoughts, with their tags.", examples=[0])
    audio_tokens: int = Field(
        description="Always 0: the text is spoken by another model, whose work isn't counted.", examples=[0]
    )


DETAILS = {
    "accepted_prediction_tokens": 0,
    "rejected_prediction_tokens": 0,
    "reasoning_tokens": 0,
    "audio_tokens": 0,
}


class Usage(BaseModel):
    """Tokens of all prompts and all candidates."""

    prompt_tokens: int = Field(description="Tokens of all prompts.", examples=[5])
    completion_tokens: int = Field(
        description="Tokens of all candidates, each through the one that completed its stop.", examples=[2]
    )
    total_tokens: int = Field(description="Both together.", examples=[7])
    prompt_tokens_details: PromptTokensDetails = Field(
        description="Of the prompt tokens.", examples=[{"cached_tokens": 0}]
    )
    completion_tokens_details: CompletionTokensDetails = Field(
        description="Of the completion tokens.",
        examples=[DETAILS],
    )


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": DETAILS,
}


class CompletionResponse(BaseModel):
    """The answer; a stream's chunks have the same shape."""

    id: str = Field(
        description="Made by the server; the same in all chunks of a stream.",
        examples=["cmpl-0b8f0c5a4f5d4d6c8a1f7e3b2c9d0e1f"],
    )
    object: Literal["text_completion", "chat.completion"] = Field(
        description="`chat.completion` where the prompt went through a chat template: with `tools`.",
        examples=["text_completion"],
    )
    created: int = CREATED
    model: str = MODEL
    system_fingerprint: str = FINGERPRINT
    choices: list[CompletionChoice] = Field(
        description="`n` for each prompt; empty in a stream's chunk with the usage.",
        examples=[[{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}]],
    )
    usage: Usage | None = Field(
        None, description="What was used; in a stream where `stream_options` asks for it.", examples=[USAGE]
    )


class ErrorBody(BaseModel):
    """What was wrong, what was given, what is allowed."""

    message: str = Field(
        description="For people.", examples=["temperature must be at least 0 and at most 2, not 9"]
    )
    type: str = Field(description="The kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field at fault, if one is.", examples=["temperature"])
    code: str | None = Field(description="For programs.", examples=["unknown_parameter"])


class ErrorResponse(BaseModel):
    """Every answer other than 200."""

    error: ErrorBody = Field(
        description="What happened.",
        examples=[
            {
                "message": "temperature must be at least 0 and at most 2, not 9",
                "type": "invalid_request_error",
                "param": "temperature",
                "code": None,
            }
        ],
    )

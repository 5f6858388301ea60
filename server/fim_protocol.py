"""What editors send: Mistral's shape (`POST /v1/fim/completions`) and llama.cpp's (`POST /infill`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenmill.server.fields import Stop
from tokenmill.server.protocol_parts import Strict
from tokenmill.server.protocol_sampling import INT31, INT64, TokenCount

MODEL = "A model's name, as for completions. May be left out where the server holds one model only."


class FimRequest(Strict):
    """Body of `POST /v1/fim/completions`."""

    model: str | None = Field(None, description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"])
    prompt: str = Field(description="The text before the cursor.", examples=["def add(a, b):\n    return "])
    suffix: str = Field("", description="The text after the cursor.", examples=["\n\nprint(add(1, 2))"])
    max_tokens: TokenCount | None = Field(
        None,
        description="Tokens to generate at the most; what is left of the context if not given.",
        examples=[64],
    )
    min_tokens: TokenCount = Field(0, description="EOS and stops are held back until then.", examples=[0])
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy; the model's default if not given.", examples=[0.2]
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Nucleus; the model's default if not given.", examples=[0.95]
    )
    random_seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="The same seed gives the same text.", examples=[1]
    )
    stop: Stop | None = Field(None, description="Up to 4 strings that end the text.", examples=[["\n\n"]])
    stream: bool = Field(False, description="Server-sent events as the text comes.", examples=[False])
    metadata: dict[str, Any] | None = Field(
        None, description="Accepted without effect: concerns Mistral's hosting.", examples=[{}]
    )


class ExtraFile(Strict):
    """Another piece of the project."""

    filename: str = Field("", description="Its name.", examples=["util.py"])
    text: str = Field(description="Its text.", examples=["def helper(): ..."])
    time: Any = Field(
        None, description="When it was seen, as editors note it: without effect.", examples=[None]
    )


class InfillRequest(Strict):
    """Body of `POST /infill`."""

    model: str | None = Field(None, description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"])
    input_prefix: str = Field(
        "", description="The text before the cursor's line or the cursor.", examples=["def f("]
    )
    input_suffix: str = Field("", description="The text after the cursor.", examples=["    return a"])
    input_extra: list[ExtraFile] = Field(
        [],
        max_length=1024,
        description="Other files, which the model sees first.",
        examples=[[{"filename": "util.py", "text": "def helper(): ..."}]],
    )
    prompt: str = Field(
        "", description="What already stands at the cursor; the answer goes on with it.", examples=[""]
    )
    n_predict: int = Field(
        -1, ge=-1, lt=INT31, description="Tokens to generate at the most; -1: what is left.", examples=[64]
    )
    n_indent: int = Field(
        0, ge=0, le=1024, description="Ends the text at a line with less indentation than that.", examples=[0]
    )
    t_max_predict_ms: int = Field(
        0,
        ge=0,
        lt=INT31,
        description="Ends the text at the first new line after that long; 0: no limit.",
        examples=[500],
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy; the model's default if not given.", examples=[0.2]
    )
    top_k: int | None = Field(
        None, ge=-1, lt=INT31, description="The k likeliest tokens; 0: all.", examples=[40]
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus.", examples=[0.95])
    min_p: float | None = Field(
        None, ge=0, le=1, description="Least share of the likeliest's mass.", examples=[0.05]
    )
    repeat_penalty: float | None = Field(
        None, gt=0, le=2, description="Divides the logits of tokens of prompt and output.", examples=[1.0]
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="As for completions.", examples=[0.0]
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="As for completions.", examples=[0.0]
    )
    seed: int | None = Field(
        None,
        ge=-INT64,
        lt=INT64,
        description="The same seed gives the same text; -1 draws one.",
        examples=[-1],
    )
    stop: Stop | None = Field(None, description="Up to 4 strings that end the text.", examples=[["\n\n"]])
    ignore_eos: bool = Field(False, description="Generate on after the model's EOS.", examples=[False])
    stream: bool = Field(False, description="Server-sent events as the text comes.", examples=[False])
    return_tokens: bool = Field(False, description="The ids of the text in `tokens`.", examples=[False])
    response_fields: list[str] = Field(
        [],
        max_length=64,
        description="The only fields of the answer; `timings/prompt_n` is a field of an inner object.",
        examples=[["content"]],
    )
    samplers: list[Annotated[str, Field(max_length=64)]] | None = Field(
        None,
        max_length=32,
        description="Accepted without effect: filters run in this server's one order, and those of which the "
        "request gives no setting are off.",
        examples=[["top_k", "top_p", "infill"]],
    )
    cache_prompt: bool | None = Field(
        None, description="Accepted without effect: prefixes are always reused.", examples=[True]
    )
    id_slot: int | None = Field(
        None, description="Accepted without effect: there are no slots.", examples=[-1]
    )
    t_max_prompt_ms: int | None = Field(
        None, ge=0, description="Accepted without effect, as llama.cpp does.", examples=[500]
    )


class FimMessage(BaseModel):
    """What was filled in."""

    role: Literal["assistant"]
    content: str
    tool_calls: None = None


class FimChoice(BaseModel):
    """The one choice of the answer; in a stream `delta` stands for `message`."""

    index: int
    message: FimMessage
    finish_reason: Literal["stop", "length"] | None


class FimUsage(BaseModel):
    """Tokens of the request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FimResponse(BaseModel):
    """The answer, in the shape of a chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[FimChoice]
    usage: FimUsage


class InfillTimings(BaseModel):
    """Tokens and milliseconds of the prompt and of the text."""

    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class InfillResponse(BaseModel):
    """The answer; a stream's events have the first fields, its last one has all.

    With `response_fields` it has only those.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))

    index: int
    content: str
    tokens: list[int]
    stop: bool
    id_slot: int
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool
    stop_type: Literal["none", "eos", "limit", "word"]
    stopping_word: str
    has_new_line: bool
    timings: InfillTimings

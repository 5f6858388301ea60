"""What editors send: Mistral's shape (`POST /v1/fim/completions`) and llama.cpp's (`POST /infill`)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from tokenmill.server.errors import shorten
from tokenmill.server.fields import Stop, refused
from tokenmill.server.protocol_parts import Strict
from tokenmill.server.protocol_sampling import INT31, INT64, TokenCount

FILTERS = {
    "temperature": ("temperature", "temp"),
    "top_k": ("top_k", "top-k"),
    "top_p": ("top_p", "top-p", "nucleus"),
    "min_p": ("min_p", "min-p"),
    "penalties": ("penalties",),
}
"""llama.cpp's filters that this server has, and what else each is called there."""
NEVER_SET = (
    "dry",
    "xtc",
    "top_n_sigma",
    "top-n-sigma",
    "typ_p",
    "typ-p",
    "typ",
    "typical",
    "typical-p",
    "infill",
)
"""Filters whose settings no request can give here; without them they are off in llama.cpp too."""


def _samplers(value: object) -> frozenset[str]:
    """The filters of a list of names, under their first names."""
    if not isinstance(value, list):
        raise refused(f"must be a list of names, not {shorten(value)}")
    for name in value:
        if name not in NEVER_SET and not any(name in names for names in FILTERS.values()):
            known = ", ".join([*FILTERS, "infill"])
            raise refused(f"there is no filter {shorten(name)}; these are known: {known}")
    return frozenset(first for first, names in FILTERS.items() if any(name in value for name in names))


Samplers = Annotated[
    frozenset[str],
    PlainValidator(_samplers, json_schema_input_type=Any),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"enum": [*(name for names in FILTERS.values() for name in names), *NEVER_SET]},
        }
    ),
]
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
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="As for completions. Not Mistral's, but editors send it.",
        examples=[0.0],
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="As for completions. Not Mistral's, but editors send it.",
        examples=[0.0],
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
    samplers: Samplers | None = Field(
        None,
        description="The filters that act, by llama.cpp's names. What the request says of one that isn't listed "
        "is left out. Their order is always this server's own, and `infill` is accepted because editors send "
        "it: the text ends where the model ends it.",
        examples=[["top_k", "top_p", "infill"]],
    )
    cache_prompt: bool = Field(
        True, description="`false`: reuse nothing of earlier prompts.", examples=[True]
    )
    id_slot: int = Field(
        -1,
        ge=-1,
        lt=INT31,
        description="Accepted without effect: in llama.cpp it says where a prompt is kept to be reused, and "
        "here every prompt may reuse every other's beginning.",
        examples=[-1],
    )
    t_max_prompt_ms: int = Field(
        0,
        ge=0,
        lt=INT31,
        description="Accepted without effect, as in llama.cpp, which doesn't enforce it either: editors send "
        "it always, and a prompt that takes longer still deserves its answer.",
        examples=[500],
    )

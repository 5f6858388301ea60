"""What every generating request may say, whatever its prompt looks like. The one place of the bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tokenmill.server.fields import LogitBias, Stop, Timeout
from tokenmill.server.protocol_parts import AudioOptions, Prediction, ResponseFormat, StreamOptions, Strict

INT64 = 1 << 63
INT31 = 1 << 31
MAX_PATTERN = 1 << 20
"""Characters of a grammar or regular expression."""

TokenCount = Annotated[int, Field(ge=0)]
HeaderMap = dict[str, str]
ChoiceText = Annotated[str, Field(min_length=1)]


class SamplingFields(Strict):
    """The fields that all generating routes share."""

    model: str | None = Field(
        None,
        description="`vendor/model_name` or `vendor/model_name/deployment`, or an alias. May be left out "
        "where the server holds one model only.",
        examples=["huggingfacetb/smollm2-135m-instruct"],
    )

    max_tokens: TokenCount | None = Field(
        None,
        description="Tokens to generate at the most. If not given: 16 for completions, what is left of the "
        "context for chat.",
        examples=[16],
    )
    max_completion_tokens: TokenCount | None = Field(
        None, description="Alias of `max_tokens`.", examples=[16]
    )
    max_new_tokens: TokenCount | None = Field(None, description="Alias of `max_tokens`.", examples=[16])
    min_tokens: TokenCount = Field(
        0, description="EOS and stops are held back until then. At most `max_tokens`.", examples=[0]
    )

    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy.", examples=[0.7])
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus: the smallest set with this mass.", examples=[0.9]
    )
    top_k: int = Field(0, ge=-1, lt=INT31, description="The k likeliest tokens; 0 or -1: all.", examples=[40])
    min_p: float = Field(
        0.0, ge=0, le=1, description="Least share of the likeliest token's mass.", examples=[0.05]
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted once from tokens generated before.", examples=[0.0]
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted for each time a token was generated before.", examples=[0.0]
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=2, description="Divides the logits of tokens of prompt and output.", examples=[1.1]
    )
    logit_bias: LogitBias = Field(
        {},
        description="Added to the logits: -100 bans a token, 100 forces it.",
        examples=[{"5": -100}],
    )
    seed: int | None = Field(
        None,
        ge=-INT64,
        lt=INT64,
        description="The same seed gives the same text. Random if not given.",
        examples=[1],
    )
    n: int = Field(1, ge=1, le=128, description="Choices for each prompt.", examples=[1])
    best_of: int | None = Field(
        None,
        ge=1,
        le=128,
        description="Candidates of which the `n` with the highest mean log-probability are returned. At "
        "least `n`, and `n` if not given.",
        examples=[1],
    )
    stop: Stop | None = Field(
        None, description="Up to 4 strings that end the text; it ends before them.", examples=[["\n"]]
    )
    stop_sequences: Stop | None = Field(None, description="Alias of `stop`.", examples=[["\n"]])
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=INT31)]] = Field(
        [], max_length=1024, description="Token ids that end the text.", examples=[[2]]
    )
    include_stop_str_in_output: bool = Field(
        False, description="Keep the stop in the text.", examples=[False]
    )
    skip_special_tokens: bool = Field(
        True, description="Leave special tokens out of the text.", examples=[True]
    )
    ignore_eos: bool = Field(
        False, description="Generate on after the model's EOS. For benchmarks.", examples=[False]
    )

    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Log-probabilities of the prompt's tokens, with k alternatives.",
        examples=[0],
    )
    return_token_ids: bool = Field(False, description="`token_ids` and `prompt_token_ids`.", examples=[False])

    stream: bool = Field(False, description="Server-sent events as the text comes.", examples=[True])
    stream_options: StreamOptions | None = Field(
        None, description="Only with `stream`.", examples=[{"include_usage": True}]
    )
    inference_timeout: Timeout | None = Field(
        None,
        description="Seconds from arrival to the answer's end; the entry's `timeout_s` if not given.",
        examples=[60],
    )
    timeout: Timeout | None = Field(None, description="Alias of `inference_timeout`.", examples=[60])
    priority: int | None = Field(
        None,
        ge=-INT31,
        lt=INT31,
        description="Lower runs first among waiting requests; 0 if not given.",
        examples=[0],
    )
    inference_extra_params: dict[str, Any] | None = Field(
        None, description="Merged into the request as if each key stood at the top.", examples=[{"top_k": 40}]
    )
    extra_body: dict[str, Any] | None = Field(
        None, description="Alias of `inference_extra_params`.", examples=[{"top_k": 40}]
    )
    inference_extra_headers: HeaderMap | None = Field(
        None,
        description="As if sent as headers: `x-request-id`, `x-priority`.",
        examples=[{"x-priority": "1"}],
    )
    extra_headers: HeaderMap | None = Field(
        None, description="Alias of `inference_extra_headers`.", examples=[{"x-priority": "1"}]
    )
    user: str | None = Field(
        None, max_length=512, description="An end user's id; logged hashed.", examples=["u-1"]
    )

    response_format: ResponseFormat | None = Field(
        None,
        description="What the answer must look like. Of this and the four `guided_` fields one may be given.",
        examples=[{"type": "json_object"}],
    )
    guided_json: dict[str, Any] | str | None = Field(
        None,
        description="The JSON schema of the answer, as an object or as text. Objects that list `properties` "
        "and don't mention `additionalProperties` get no other keys.",
        examples=[{"type": "object"}],
    )
    guided_regex: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_PATTERN,
        description="A regular expression that the whole answer matches.",
        examples=["[0-9]{4}"],
    )
    guided_choice: list[ChoiceText] | None = Field(
        None, min_length=1, description="The answer is one of these.", examples=[["yes", "no"]]
    )
    guided_grammar: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_PATTERN,
        description="A grammar in Lark's or in EBNF (GBNF) notation that the answer follows.",
        examples=['root ::= "yes" | "no"'],
    )
    prediction: Prediction | None = Field(
        None,
        description="The expected output: drafted from, and verified. Faster where it is right; the text is "
        "what it would have been without. Not drafted where the model's entry says so.",
        examples=[{"type": "content", "content": "def main():\n    pass\n"}],
    )
    tools: list[dict[str, Any]] | None = Field(
        None,
        max_length=1024,
        description="Functions that the model may call.",
        examples=[
            [
                {
                    "type": "function",
                    "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
                }
            ]
        ],
    )
    tool_choice: Any = Field(
        None,
        description="`none`, `auto` (the default with tools), `required`, or a named function.",
        examples=["auto"],
    )
    parallel_tool_calls: bool | None = Field(
        None, description="`false`: at most one call. Without effect where no tools are.", examples=[True]
    )
    modalities: list[Literal["text", "audio"]] | None = Field(
        None,
        max_length=2,
        description='`["text"]`, or `["text", "audio"]` where the model\'s entry has `speech`: the answer is '
        "spoken.",
        examples=[["text"]],
    )
    audio: AudioOptions | None = Field(
        None,
        description="How the answer is spoken. Only with `audio` among the `modalities`.",
        examples=[{"format": "wav", "voice": "0"}],
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the chat template.", examples=[{}]
    )
    reasoning_effort: str | None = Field(
        None, max_length=64, description="An effort's name, given to the chat template.", examples=["low"]
    )

    store: bool | None = Field(
        None, description="Accepted without effect: concerns OpenAI's hosting.", examples=[False]
    )
    metadata: dict[str, str] | None = Field(
        None, max_length=16, description="Accepted without effect: concerns OpenAI's hosting.", examples=[{}]
    )
    service_tier: str | None = Field(
        None,
        max_length=64,
        description="Accepted without effect: concerns OpenAI's hosting.",
        examples=["auto"],
    )
    safety_identifier: str | None = Field(
        None,
        max_length=512,
        description="Accepted without effect: concerns OpenAI's hosting.",
        examples=["u-1"],
    )
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="Accepted without effect: concerns OpenAI's hosting.",
        examples=["k-1"],
    )

    @property
    def candidates(self) -> int:
        """Sequences generated for each prompt."""
        return self.best_of or self.n

    @property
    def speaks(self) -> bool:
        """Whether the answer is to be spoken."""
        return "audio" in (self.modalities or ())

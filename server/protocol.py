"""The completion request: every field with type, bounds, default and meaning. The one place of the bounds.

JSON types are strict, null means "not given", and a field that isn't here is refused by name. What a single
field can't show (conflicts, aliases) is checked by `parse_completion`, what needs a model by `admission.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenmill.server.fields import LogitBias, Logprobs, Prompt, Stop, Timeout

MAX_TOKENS_DEFAULT = 16
INT64 = 1 << 63
INT31 = 1 << 31

TokenCount = Annotated[int, Field(ge=0)]
HeaderMap = dict[str, str]


class Strict(BaseModel):
    """A JSON object with known keys, strict types and finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool = Field(
        False, description="One last chunk with the usage and no choices.", examples=[True]
    )
    continuous_usage_stats: bool = Field(
        False, description="The usage so far on each chunk.", examples=[False]
    )
    include_obfuscation: bool = Field(
        False, description="Accepted for OpenAI's clients; chunks are never padded.", examples=[False]
    )


class ResponseFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="What to enforce.", examples=["text"]
    )
    json_schema: dict[str, Any] | None = Field(None, description="The schema of `json_schema`.")


class CompletionRequest(Strict):
    """Body of `POST /v1/completions` and `POST /v4/beta/completions`."""

    model: str | None = Field(
        None,
        description="`vendor/model_name` or `vendor/model_name/deployment`, or an alias. May be left out "
        "where the server holds one model only.",
        examples=["huggingfacetb/smollm2-135m-instruct"],
    )
    prompt: Prompt = Field(
        description="One prompt or a list of them, as text or token ids. An empty string starts from the "
        "model's BOS. Choice `i` of prompt `p` has the index `p * n + i`.",
        examples=["The capital of France is"],
    )
    suffix: str | None = Field(
        None, description="Text after the completion. Not supported yet.", examples=[""]
    )

    max_tokens: TokenCount | None = Field(
        None, description=f"Tokens to generate at the most; {MAX_TOKENS_DEFAULT} if not given.", examples=[16]
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
    top_k: int = Field(0, ge=-1, lt=INT31, description="The k likeliest tokens; 0 or -1: all.", examples=[50])
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
        default_factory=dict,
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
        default_factory=list, max_length=1024, description="Token ids that end the text.", examples=[[2]]
    )
    include_stop_str_in_output: bool = Field(
        False, description="Keep the stop in the text.", examples=[False]
    )
    ignore_eos: bool = Field(
        False, description="Generate on after the model's EOS. For benchmarks.", examples=[False]
    )

    logprobs: Logprobs = Field(
        False,
        description="`true`: `content[]` with `top_logprobs` alternatives, beside the legacy arrays. An "
        "integer k: the legacy arrays with k alternatives.",
        examples=[5],
    )
    top_logprobs: int = Field(0, ge=0, le=20, description="Alternatives with `logprobs: true`.", examples=[5])
    return_token_log_probs: bool = Field(False, description="Alias of `logprobs: true`.", examples=[False])
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Log-probabilities of the prompt's tokens, with k alternatives.",
        examples=[0],
    )
    echo: bool = Field(False, description="The prompt before the completion.", examples=[False])
    return_token_ids: bool = Field(False, description="`token_ids` and `prompt_token_ids`.", examples=[False])
    skip_special_tokens: bool = Field(
        True, description="Leave special tokens out of the text.", examples=[True]
    )
    add_special_tokens: bool = Field(
        True, description="Add BOS and the like to text prompts.", examples=[True]
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, lt=INT31, description="Keep the last that many tokens of a prompt.", examples=[1024]
    )

    stream: bool = Field(False, description="Server-sent events as the text comes.", examples=[False])
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
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

    response_format: ResponseFormat | None = Field(None, description="`text` only, for now.")
    guided_json: Any = Field(None, description="Not supported yet.", examples=[None])
    guided_regex: str | None = Field(None, description="Not supported yet.", examples=[None])
    guided_choice: list[str] | None = Field(None, description="Not supported yet.", examples=[None])
    guided_grammar: str | None = Field(None, description="Not supported yet.", examples=[None])
    tools: list[dict[str, Any]] | None = Field(None, description="None, for now.", examples=[[]])
    tool_choice: Any = Field(None, description="`none` or `auto`.", examples=["none"])
    parallel_tool_calls: bool | None = Field(
        None, description="Without effect where no tools are.", examples=[True]
    )
    prediction: dict[str, Any] | None = Field(None, description="Not supported yet.", examples=[None])
    modalities: list[Literal["text", "audio"]] | None = Field(
        None, description="`text` only, for now.", examples=[["text"]]
    )
    audio: dict[str, Any] | None = Field(None, description="Not supported yet.", examples=[None])
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Not supported yet: a completion's prompt goes through no template.", examples=[{}]
    )
    reasoning_effort: str | None = Field(None, description="Not supported yet.", examples=[None])

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
    def chat_logprobs(self) -> bool:
        """Whether the chat-shaped `content[]` was asked for."""
        return self.logprobs is True or self.return_token_log_probs

    @property
    def alternatives(self) -> int | None:
        """Alternatives listed at each position; None where no log-probabilities were asked for."""
        if self.chat_logprobs:
            return self.top_logprobs
        return None if self.logprobs is False else int(self.logprobs)

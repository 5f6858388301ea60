"""The completion request: every field with type, bounds, default and meaning.

JSON types are strict, null means "not given", and a field that isn't here is refused by name. What a single
field can't show (conflicts, aliases) is checked by `parse_completion`, what needs a model by `admission.py`.
"""

from __future__ import annotations

from pydantic import Field

from tokenmill.server.fields import Logprobs, Prompt
from tokenmill.server.protocol_sampling import INT31, SamplingFields

MAX_TOKENS_DEFAULT = 16


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions` and `POST /v4/beta/completions`."""

    prompt: Prompt = Field(
        description="One prompt or a list of them, as text or token ids. An empty string starts from the "
        "model's BOS. Choice `i` of prompt `p` has the index `p * n + i`.",
        examples=["The capital of France is"],
    )
    suffix: str | None = Field(
        None,
        description="Text after the completion: fill in the middle, by the model's own tokens for it. Models "
        "without such tokens refuse it, unless their entry says `suffix: rerank`.",
        examples=["\n    return total"],
    )

    logprobs: Logprobs = Field(
        False,
        description="`true`: `content[]` with `top_logprobs` alternatives, beside the legacy arrays. An "
        "integer k: the legacy arrays with k alternatives.",
        examples=[True, 5],
    )
    top_logprobs: int = Field(0, ge=0, le=20, description="Alternatives with `logprobs: true`.", examples=[5])
    return_token_log_probs: bool = Field(False, description="Alias of `logprobs: true`.", examples=[False])
    echo: bool = Field(False, description="The prompt before the completion.", examples=[False])
    add_special_tokens: bool = Field(
        True, description="Add BOS and the like to text prompts.", examples=[True]
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=1, lt=INT31, description="Keep the last that many tokens of a prompt.", examples=[1024]
    )

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

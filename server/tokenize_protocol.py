"""Text to ids and back over HTTP, in the shapes that vLLM uses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from tokenmill.server.fields import MAX_TOKEN_ID
from tokenmill.server.protocol_parts import Strict

MODEL = "A model's name, as for completions. May be left out where the server holds one model only."
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or a conversation that is rendered with the chat template."""

    model: str | None = Field(None, description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"])
    prompt: str | None = Field(None, description="The text. Either it or `messages`.", examples=["The mill"])
    add_special_tokens: bool | None = Field(
        None,
        description="Add BOS and the like: yes for a prompt, no for messages, whose template writes them.",
        examples=[True],
    )
    return_token_strs: bool = Field(False, description="Also the text of each token.", examples=[True])
    messages: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="The conversation, as for chat completions.",
        examples=[[{"role": "user", "content": "Hello"}]],
    )
    tools: list[dict[str, Any]] | None = Field(
        None, description="Functions for the template, as for chat completions.", examples=[[]]
    )
    add_generation_prompt: bool = Field(
        True, description="Whether what begins the assistant's turn belongs to it.", examples=[True]
    )
    continue_final_message: bool = Field(
        False, description="Leave the last message open, to be gone on with.", examples=[False]
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables for the chat template.", examples=[{}]
    )


class TokenizeResponse(BaseModel):
    """The ids."""

    count: int
    max_model_len: int = Field(description="Tokens of prompt and completion together.")
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"])
    tokens: list[TokenId] = Field(description="Ids within the model's vocabulary.", examples=[[1, 2, 3]])


class DetokenizeResponse(BaseModel):
    """The text, special tokens included."""

    prompt: str


class TokenizerInfoResponse(BaseModel):
    """What a client needs to render and count prompts by itself."""

    model: str
    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None

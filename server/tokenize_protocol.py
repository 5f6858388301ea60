"""Text to ids and back over HTTP, in the shapes that vLLM uses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tokenmill.server.fields import MAX_TOKEN_ID
from tokenmill.server.fim_protocol import MODEL
from tokenmill.server.protocol_parts import Strict

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


def _either(schema: dict[str, Any]) -> None:
    """One of the two, and null means "not given"."""
    text, messages, none = {"type": "string"}, {"type": "array"}, {"type": "null"}
    schema["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": text, "messages": none}},
        {"required": ["messages"], "properties": {"prompt": none, "messages": messages}},
    ]


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or a conversation that is rendered with the chat template."""

    model_config = ConfigDict(json_schema_extra=_either)

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

    count: int = Field(description="How many ids.", examples=[3])
    max_model_len: int = Field(description="Tokens of prompt and completion together.", examples=[8192])
    tokens: list[int] = Field(description="The ids.", examples=[[504, 5137, 30]])
    token_strs: list[str] | None = Field(
        None,
        description="With `return_token_strs`: each token decoded alone.",
        examples=[["The", " mill", "."]],
    )


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"])
    tokens: list[TokenId] = Field(description="Ids within the model's vocabulary.", examples=[[1, 2, 3]])


class DetokenizeResponse(BaseModel):
    """The text."""

    prompt: str = Field(description="The text of the ids, special tokens included.", examples=["The mill."])


class TokenizerInfoResponse(BaseModel):
    """What a client needs to render and count prompts by itself."""

    model: str = Field(
        description="The entry or deployment.", examples=["huggingfacetb/smollm2-135m-instruct"]
    )
    tokenizer_class: str = Field(
        description="The class of transformers that reads such a tokenizer.",
        examples=["PreTrainedTokenizerFast"],
    )
    model_max_length: int = Field(description="Tokens of prompt and completion together.", examples=[8192])
    vocab_size: int = Field(description="Ids that the tokenizer can make.", examples=[49152])
    bos_token: str | None = Field(description="What begins a text.", examples=["<|im_start|>"])
    eos_token: str | None = Field(description="What ends one.", examples=["<|im_end|>"])
    unk_token: str | None = Field(description="What stands for the unknown.", examples=["<|endoftext|>"])
    pad_token: str | None = Field(description="What fills up.", examples=["<|im_end|>"])
    bos_token_id: int | None = Field(description="The id of `bos_token`.", examples=[1])
    eos_token_ids: list[int] = Field(description="Ids that end a generation.", examples=[[2, 0]])
    chat_template: str | None = Field(
        description="The template of chats: Jinja.", examples=["{% for message in messages %}…{% endfor %}"]
    )

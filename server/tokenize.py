"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from tokenmill.server.body import decode_object, read_body
from tokenmill.server.chat_parse import parse_chat
from tokenmill.server.chat_prompt import chat_prompt
from tokenmill.server.completions import EndpointOptions
from tokenmill.server.context import RequestContext
from tokenmill.server.errors import bad_request
from tokenmill.server.parse import validated
from tokenmill.server.prompts import by_size, encode_texts
from tokenmill.server.registry import Registry
from tokenmill.server.responses import send_json
from tokenmill.server.tokenize_protocol import DetokenizeRequest, TokenizeRequest

CHAT_FIELDS = {
    "messages",
    "tools",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
}
"""What `/tokenize` shares with chat requests."""

Handler = Callable[[dict[str, Any], Registry, EndpointOptions], Awaitable[dict[str, object]]]


class TokenizerEndpoint:
    """The handler of a route that takes a JSON object and needs a model's tokenizer."""

    def __init__(self, registry: Registry, options: EndpointOptions, answer: Handler) -> None:
        self._registry = registry
        self._options = options
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `ApiError` or `ClientGone`."""
        context: RequestContext = scope["state"]["context"]
        values = decode_object(await read_body(scope, receive, self._options.max_body))
        answer = await self._answer(values, self._registry, self._options)
        await send_json(send, 200, msgspec.json.encode(answer), context.response_headers())


async def tokenize(values: dict[str, Any], registry: Registry, options: EndpointOptions) -> dict[str, object]:
    """Ids of a text or a conversation. Raises `ApiError`."""
    request = validated(values, TokenizeRequest, options.warn_unknown)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request(
            "give either prompt or messages", "prompt" if request.prompt is None else "messages"
        )
    variant, model = registry.resolve(request.model)
    engine = await model.acquire()
    if request.prompt is not None:
        special = request.add_special_tokens is not False
        (ids,) = await encode_texts(engine.tokenizer, [request.prompt], special)
    else:
        chat = parse_chat(msgspec.json.encode(request.model_dump(include=CHAT_FIELDS, exclude_unset=True)))
        ids = (await chat_prompt(chat, variant, engine)).ids
    texts = [engine.tokenizer.token_text(token) for token in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.context, "tokens": ids, "token_strs": texts}


async def detokenize(
    values: dict[str, Any], registry: Registry, options: EndpointOptions
) -> dict[str, object]:
    """The text of ids. Raises `ApiError`."""
    request = validated(values, DetokenizeRequest, options.warn_unknown)
    _, model = registry.resolve(request.model)
    engine = await model.acquire()
    width = engine.ready.logits_width
    wrong = next((token for token in request.tokens if token >= width), None)
    if wrong is not None:
        message = f"tokens: token {wrong} is outside the model's vocabulary of {width}"
        raise bad_request(message, "tokens")
    return {"prompt": await by_size(len(request.tokens), engine.tokenizer.decode, request.tokens, False)}


async def tokenizer_info(model_name: str | None, registry: Registry) -> dict[str, object]:
    """What `GET /tokenizer_info` says of a model. Raises `ApiError`."""
    variant, model = registry.resolve(model_name)
    engine = await model.acquire()
    info = engine.tokenizer.info
    return {
        "model": variant.name,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": engine.context,
        "vocab_size": info.vocab_size,
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "unk_token": info.special_tokens.get("unk_token"),
        "pad_token": info.special_tokens.get("pad_token"),
        "bos_token_id": info.bos_id,
        "eos_token_ids": info.eos_ids,
        "chat_template": variant.chat_template if variant.chat_template is not None else info.chat_template,
    }

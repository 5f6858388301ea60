"""The routes that answer with a model: their paths, handlers, and what the OpenAPI document says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Path, Query
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenmill.server.chat import ChatEndpoint
from tokenmill.server.chat_protocol import ChatRequest
from tokenmill.server.chat_protocol_responses import ChatResponse
from tokenmill.server.completion_tools import CompletionEndpoint
from tokenmill.server.completions import EndpointOptions
from tokenmill.server.config import ServerConfig
from tokenmill.server.fim_protocol import MODEL, FimRequest, InfillRequest
from tokenmill.server.fim_protocol_responses import FimResponse, InfillResponse
from tokenmill.server.fim_routes import FimEndpoint, InfillEndpoint
from tokenmill.server.openapi import Operation
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.protocol_responses import CompletionResponse
from tokenmill.server.registry import Registry
from tokenmill.server.tokenize import TokenizerEndpoint, detokenize, tokenize, tokenizer_info
from tokenmill.server.tokenize_protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfoResponse,
)

ModelId = Annotated[
    str,
    Path(
        description="A model's name, a deployment's or an alias. It may hold slashes.",
        examples=["huggingfacetb/smollm2-135m-instruct"],
    ),
]
ModelQuery = Annotated[
    str | None,
    Query(description=MODEL, examples=["huggingfacetb/smollm2-135m-instruct"]),
]
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Deferred(Response):
    """A response that a plain ASGI handler writes; it reads the body and sees the client leave by itself."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handler(scope, receive, send)


class Route(msgspec.Struct, frozen=True):
    """One `POST` route."""

    path: str
    handler: Handler
    summary: str
    name: str
    body: type[BaseModel]
    answer: type[BaseModel]
    example: dict[str, Any]
    """A body that works as it is; put together from the examples of all fields it wouldn't."""
    streams: bool = True


def add_model_routes(app: FastAPI, registry: Registry, config: ServerConfig) -> list[Operation]:
    """All routes that need a model; what they take and give."""
    routes = _routes(registry, config)
    for route in routes:
        app.add_api_route(
            route.path,
            _defer(route.handler),
            methods=["POST"],
            summary=route.summary,
            response_class=Response,
            operation_id=route.name,
        )

    @app.get("/tokenizer_info", summary="Describe a model's tokenizer", response_class=Response)
    async def get_tokenizer_info(model: ModelQuery = None) -> Response:
        info = await tokenizer_info(model, registry)
        return Response(msgspec.json.encode(info), media_type="application/json")

    operations = [
        Operation(route.path, route.answer, route.body, route.streams, route.example) for route in routes
    ]
    return [
        *operations,
        Operation("/tokenizer_info", TokenizerInfoResponse, errors=("400", "404", "503")),
    ]


def _routes(registry: Registry, config: ServerConfig) -> list[Route]:
    options = EndpointOptions(
        max_body=int(config.max_body_mb * (1 << 20)),
        warn_unknown=config.unknown_parameters == "warn",
        salt_rule=config.cache_salt,
    )
    gateway = msgspec.structs.replace(options, gateway=True)
    completions = (
        CompletionRequest,
        CompletionResponse,
        {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
    )
    return [
        Route(
            "/v1/completions",
            CompletionEndpoint(registry, options),
            "Create a completion",
            "create_completion",
            *completions,
        ),
        Route(
            "/v4/beta/completions",
            CompletionEndpoint(registry, gateway),
            "Create a completion, in the gateway's way of streaming",
            "create_gateway_completion",
            *completions,
        ),
        Route(
            "/v1/chat/completions",
            ChatEndpoint(registry, options),
            "Answer a conversation",
            "create_chat_completion",
            ChatRequest,
            ChatResponse,
            {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64},
        ),
        Route(
            "/v1/fim/completions",
            FimEndpoint(registry, options),
            "Fill in the middle, in Mistral's shape",
            "create_fim_completion",
            FimRequest,
            FimResponse,
            {"prompt": "def add(a, b):\n    return ", "max_tokens": 16},
        ),
        Route(
            "/infill",
            InfillEndpoint(registry, options),
            "Fill in the middle, in llama.cpp's shape",
            "infill",
            InfillRequest,
            InfillResponse,
            {"input_prefix": "def add(a, b):\n    return ", "n_predict": 16},
        ),
        *_tokenizer_routes(registry, options),
    ]


def _tokenizer_routes(registry: Registry, options: EndpointOptions) -> list[Route]:
    return [
        Route(
            "/tokenize",
            TokenizerEndpoint(registry, options, tokenize),
            "Token ids of a text or a conversation",
            "tokenize",
            TokenizeRequest,
            TokenizeResponse,
            {"prompt": "The mill."},
            streams=False,
        ),
        Route(
            "/detokenize",
            TokenizerEndpoint(registry, options, detokenize),
            "Text of token ids",
            "detokenize",
            DetokenizeRequest,
            DetokenizeResponse,
            {"tokens": [1, 2, 3]},
            streams=False,
        ),
    ]


def _defer(handler: Handler) -> Callable[[], Awaitable[Response]]:
    async def respond() -> Response:
        return Deferred(handler)

    return respond

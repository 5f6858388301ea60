"""`POST /v1/chat/completions`: the prompt from the messages, the message from the text."""

from __future__ import annotations

from functools import partial

from tokenmill.server.admission import Job, make_job
from tokenmill.server.chat_answer import ChatAnswer
from tokenmill.server.chat_parse import ChatInput, parse_chat
from tokenmill.server.chat_prompt import ChatPrompt, chat_prompt
from tokenmill.server.completions import Asked, Exchange, GeneratingEndpoint, MakeExchange, Writer
from tokenmill.server.errors import ApiError
from tokenmill.server.generation import Generation
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.protocol import CompletionRequest


class ChatEndpoint(GeneratingEndpoint):
    """The handler of the chat route."""

    id_prefix = "chat"

    def _read(self, body: bytes) -> tuple[CompletionRequest, MakeExchange]:
        chat = parse_chat(body, self._options.warn_unknown)
        return chat.completion, partial(ChatExchange, chat)


class ChatExchange(Exchange):
    """One chat request to one model, and its answer."""

    def __init__(self, chat: ChatInput, asked: Asked) -> None:
        super().__init__(asked)
        self._chat = chat
        self._prompt: ChatPrompt

    async def _job(self, engine: Engine, salt: str) -> Job:
        try:
            self._prompt = await chat_prompt(self._chat, self._variant, engine)
            request = self._request.model_copy(update={"prompt": [self._prompt.ids]})
            headers = self._context.headers
            job = await make_job(request, self._variant, engine, headers, salt, default_max_tokens=None)
        except ApiError as error:
            # Messages became the prompt; the client knows no other.
            error.param = "messages" if error.param == "prompt" else error.param
            raise
        return self._prompt.adapt(job, engine.tokenizer)

    def _answer(self, generation: Generation) -> Writer:
        return ChatAnswer(generation, self._prompt, self._request, self._name)

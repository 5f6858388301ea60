"""Completions with `tools`: the prompt becomes a chat message of the user, calls stand beside the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from tokenmill.server.admission import Job, make_job
from tokenmill.server.chat_answer import ParsedAnswer
from tokenmill.server.chat_parse import template_variables
from tokenmill.server.chat_prompt import completion_as_chat
from tokenmill.server.completions import Exchange, GeneratingEndpoint, MakeExchange, Writer
from tokenmill.server.errors import bad_request
from tokenmill.server.generation import Choice, Generation
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.parse import parse_completion
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.tool_protocol import read_tools

_encode = msgspec.json.Encoder().encode


class CompletionEndpoint(GeneratingEndpoint):
    """The handler of a completions route, with tools or without."""

    def _read(self, body: bytes) -> tuple[CompletionRequest, MakeExchange]:
        request = parse_completion(body, self._options.warn_unknown)
        check_tools(request)
        return request, ToolExchange if request.tools else Exchange


def check_tools(request: CompletionRequest) -> None:
    """The tools themselves, and what can't go with them. Raises `ApiError` 400."""
    read_tools(request)
    variables = template_variables(request)
    if not request.tools:
        if variables:
            param = "chat_template_kwargs" if request.chat_template_kwargs else "reasoning_effort"
            raise bad_request(f"{param}: without tools a completion's prompt goes through no template", param)
        return
    legacy = request.logprobs is not False and not request.chat_logprobs
    for param, given, why in (
        ("suffix", bool(request.suffix), "the prompt becomes a chat message"),
        ("echo", request.echo, "the prompt becomes a chat message"),
        ("prompt_logprobs", request.prompt_logprobs is not None, "the prompt becomes a chat message"),
        ("logprobs", legacy, "the arrays can't point into a text without its calls; say true"),
    ):
        if given:
            raise bad_request(f"{param} doesn't go with tools: {why}", param)


class ToolExchange(Exchange):
    """One completion request that brings tools."""

    async def _job(self, engine: Engine, salt: str) -> Job:
        self._prompts = await completion_as_chat(self._request, self._variant, engine)
        request = self._request.model_copy(update={"prompt": [prompt.ids for prompt in self._prompts]})
        job = await make_job(request, self._variant, engine, self._context.headers, salt)
        return self._prompts[0].adapt(job, engine.tokenizer)

    def _answer(self, generation: Generation) -> Writer:
        return ToolAnswer(generation, self._prompts, self._request, "chat.completion", self._name)


class ToolAnswer(ParsedAnswer):
    """Writes the choices: `text` and `tool_calls`, and the thoughts of a model that thinks between tags."""

    def whole(self) -> bytes:
        """The JSON of a finished generation."""
        choices = [self._whole_choice(choice) for choice in self._generation.returned()]
        return _encode({**self._head, "choices": choices, "usage": self._usage()})

    def _whole_choice(self, choice: Choice) -> dict[str, object]:
        text = self._text(choice)
        text.feed(choice.take_text())
        text.finish(choice.finish_reason)
        message = text.message()
        row = {"index": choice.index, "text": message["content"] or ""}
        row |= {key: message[key] for key in ("reasoning_content", "tool_calls") if key in message}
        return {**row, **self._extras(choice), "finish_reason": text.finish_reason(choice.finish_reason)}

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """Server-sent events with the news of these choices."""
        rows = [row for choice in choices for row in self._news(choice)]
        return b"".join([self._open + _encode(row) + self._closed() for row in rows])

    def _news(self, choice: Choice) -> list[dict[str, object]]:
        text = self._text(choice)
        deltas: list[dict[str, Any]] = text.feed(choice.take_text())
        if choice.finish_reason is not None:
            deltas += text.finish(choice.finish_reason)
        rows = []
        for delta in deltas:
            row = {"index": choice.index, "text": delta.pop("content", "")}
            rows.append({**row, **delta, **self._extras(choice), "finish_reason": None})
        if choice.finish_reason is not None:
            finish = text.finish_reason(choice.finish_reason)
            rows.append({"index": choice.index, "text": "", **self._extras(choice), "finish_reason": finish})
        return rows

    def _extras(self, choice: Choice) -> dict[str, object]:
        """Log-probabilities and ids of the tokens that haven't gone out yet."""
        sent, end = self._sent.get(choice, 0), choice.detokenizer.settled
        self._sent[choice] = end
        extras: dict[str, object] = {"logprobs": None}
        alternatives = self._request.alternatives
        if alternatives is not None and end > sent:
            extras["logprobs"] = self._content(self._scored(choice, sent), alternatives)
        if self._request.return_token_ids:
            extras["token_ids"] = choice.ids[sent:end]
            if not sent:
                extras["prompt_token_ids"] = choice.run.prompt.ids
        return extras

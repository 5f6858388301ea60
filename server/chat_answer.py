"""The answer to a chat request, whole or in chunks, from the choices of its generation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from tokenmill.server.answer import AnswerWriter
from tokenmill.server.chat_prompt import ChatPrompt
from tokenmill.server.chat_text import ChatText
from tokenmill.server.generation import Choice, Generation
from tokenmill.server.logprobs import ScoredTokens, prompt_logprobs
from tokenmill.server.protocol import CompletionRequest

_encode = msgspec.json.Encoder().encode
FIRST_DELTA = {"role": "assistant", "content": "", "refusal": None}
NO_LOGPROBS = b"null"


class ParsedAnswer(AnswerWriter):
    """For answers whose text is taken apart: thoughts, content, calls."""

    def __init__(
        self,
        generation: Generation,
        prompts: list[ChatPrompt],
        request: CompletionRequest,
        kind: str,
        model: str,
    ) -> None:
        super().__init__(generation, request, kind, model)
        self._prompts = dict(zip(generation.runs, prompts, strict=True))
        self._texts: dict[Choice, ChatText] = {}

    def _text(self, choice: Choice) -> ChatText:
        text = self._texts.get(choice)
        if text is None:
            text = self._texts[choice] = self._prompts[choice.run].new_text(self._generation.job)
        return text

    def _usage(self) -> dict[str, object]:
        """The generation's usage, with the tokens that were thoughts."""
        return self._generation.usage(
            sum(text.reasoning_tokens(choice.detokenizer.offsets) for choice, text in self._texts.items())
        )


class ChatAnswer(ParsedAnswer):
    """Writes one generation's answer.

    In a stream each choice has a first chunk with the role, chunks of thoughts, content or calls, and a last
    chunk with the finish reason. Log-probabilities go with the next chunk that there is.
    """

    def __init__(
        self, generation: Generation, prompt: ChatPrompt, request: CompletionRequest, model: str
    ) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(generation, [prompt], request, kind, model)

    def whole(self) -> bytes:
        """The JSON of a finished generation."""
        choices = [self._whole_choice(choice) for choice in self._generation.returned()]
        # Candidates that aren't returned count in the usage too, their thoughts included.
        for choice in [choice for run in self._generation.runs for choice in run.choices]:
            if choice not in self._texts:
                self._text(choice).feed(choice.take_text())
        answer = {**self._head, **self._about_prompt(), "choices": choices, "usage": self._usage()}
        return _encode(answer)

    def _whole_choice(self, choice: Choice) -> dict[str, object]:
        text = self._text(choice)
        text.feed(choice.take_text())
        text.finish(choice.finish_reason)
        return {
            "index": choice.index,
            "message": text.message(),
            "logprobs": self._logprobs(choice, 0),
            "finish_reason": text.finish_reason(choice.finish_reason),
            **self._token_ids(choice, 0),
        }

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """Server-sent events with the news of these choices, as one piece of bytes."""
        return b"".join([chunk for choice in choices for chunk in self._news(choice)])

    def _news(self, choice: Choice) -> list[bytes]:
        chunks = []
        first = choice not in self._texts
        text = self._text(choice)
        if first:
            chunks.append(self._first(choice))
        deltas = text.feed(choice.take_text())
        if choice.finish_reason is not None:
            deltas += text.finish(choice.finish_reason)
        chunks += [self._chunk(choice, delta) for delta in deltas]
        if choice.finish_reason is not None:
            chunks.append(self._chunk(choice, {}, text.finish_reason(choice.finish_reason)))
        return chunks

    def _first(self, choice: Choice) -> bytes:
        """The chunk with the role, and with what was asked for about the prompt."""
        about = self._about_prompt()
        own = b"data: " + _encode({**self._head, **about})[:-1] + b',"choices":[' if about else self._open
        return own + b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}%b' % (
            choice.index,
            _encode(FIRST_DELTA),
            self._closed(),
        )

    def _chunk(self, choice: Choice, delta: dict[str, Any], finish: str | None = None) -> bytes:
        extras = b""
        logprobs = NO_LOGPROBS
        if self._detailed:
            sent, settled = self._sent.get(choice, 0), choice.detokenizer.settled
            if settled > sent:
                logprobs = _encode(self._logprobs(choice, sent))
            if self._request.return_token_ids:
                extras = b"," + _encode(self._token_ids(choice, sent))[1:-1]
            self._sent[choice] = settled
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b}%b' % (
            self._open,
            choice.index,
            _encode(delta),
            logprobs,
            _encode(finish),
            extras,
            self._closed(),
        )

    def _logprobs(self, choice: Choice, sent: int) -> dict[str, object] | None:
        """The log-probabilities of the tokens from `sent` on that start before the text's end."""
        alternatives = self._request.alternatives
        if alternatives is None:
            return None
        return self._content(self._scored(choice, sent), alternatives)

    def _token_ids(self, choice: Choice, sent: int) -> dict[str, object]:
        if not self._request.return_token_ids:
            return {}
        return {"token_ids": choice.ids[sent : choice.detokenizer.settled]}

    def _about_prompt(self) -> dict[str, object]:
        """What was asked for about the prompt's tokens."""
        (run,) = self._generation.runs
        about: dict[str, object] = {}
        if self._request.return_token_ids:
            about["prompt_token_ids"] = run.prompt.ids
        alternatives = self._request.prompt_logprobs
        if alternatives is not None:
            ids = run.prompt.ids
            scored = ScoredTokens(ids, [None, *run.scores], [None, *run.score_top], [0] * len(ids))
            about["prompt_logprobs"] = prompt_logprobs(self._tokenizer, scored, alternatives)
        return about

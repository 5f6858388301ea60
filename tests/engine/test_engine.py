"""The engine as a whole on a tiny model: settings, aborts, faults, and that nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from checkpoints import eager_model
from torch import Tensor

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.engine import Engine, InvalidRequest
from tokenmill.engine.input_batch import StepInputs
from tokenmill.engine.messages import Add, Delta
from tokenmill.engine.step import Step
from tokenmill.engine.tiny import make_tiny

PROMPT = list(range(10, 40))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("engine")))


@pytest.fixture
def llm(folder: str) -> Iterator[LLM]:
    one = LLM(folder, max_context=128, num_blocks=60)
    yield one
    one.engine.scheduler.check_integrity()
    assert one.engine.pool.used_blocks == 0
    assert not one.engine.has_work


def run(engine: Engine, *messages: Add) -> dict[tuple[int, int], list[Delta]]:
    """Add requests and step until nothing is left; the deltas by request and choice."""
    news: dict[tuple[int, int], list[Delta]] = {}
    for message in messages:
        engine.add(message)
    while engine.has_work:
        for delta in engine.step():
            news.setdefault((delta.request, delta.choice), []).append(delta)
    return news


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_penalties_equal_a_step_by_step_reference(llm: LLM, folder: str) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=30,
        ignore_eos=True,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
    )
    model = eager_model(folder)
    ids = list(PROMPT)
    with torch.inference_mode():
        while len(ids) < len(PROMPT) + params.max_tokens:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()
            output = ids[len(PROMPT) :]
            for token in set(ids):
                value = logits[token]
                logits[token] = value / 1.3 if value > 0 else value * 1.3
            for token in set(output):
                logits[token] -= 0.7 + 0.4 * output.count(token)
            ids.append(max(range(len(logits)), key=lambda t: (logits[t], -t)))
    assert llm.generate([PROMPT], params)[0].choices[0].token_ids == ids[len(PROMPT) :]


def test_bias_of_100_forces_and_of_minus_100_bans(llm: LLM) -> None:
    forced = SamplingParams(seed=1, max_tokens=8, logit_bias={17: 100}, ignore_eos=True)
    assert llm.generate([PROMPT], forced)[0].choices[0].token_ids == [17] * 8
    plain = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    banned = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, logit_bias=dict.fromkeys(set(plain), -100)
    )
    assert not set(llm.generate([PROMPT], banned)[0].choices[0].token_ids) & set(plain)


def test_a_neighbours_bias_changes_nothing(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    alone = llm.generate([PROMPT], params)[0].choices[0]
    biased = SamplingParams(max_tokens=12, logit_bias=dict.fromkeys(range(300), -50), presence_penalty=2)
    beside = llm.generate([PROMPT, PROMPT[:5]], [params, biased])[0].choices[0]
    assert beside.token_ids == alone.token_ids
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_eos_and_stop_ids_end_and_min_tokens_holds_them_back(llm: LLM) -> None:
    plain = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    stop = plain[3]
    first = plain.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    choice = llm.generate([PROMPT], params)[0].choices[0]
    assert choice.token_ids == plain[: first + 1]
    assert choice.finish_reason == "stop"
    late = SamplingParams(temperature=0, max_tokens=12, min_tokens=6, ignore_eos=True, stop_token_ids=(stop,))
    choice = llm.generate([PROMPT], late)[0].choices[0]
    assert stop not in choice.token_ids[:6]
    eos = llm.engine.model.eos_ids[0]
    ended = SamplingParams(temperature=0, max_tokens=12, logit_bias={eos: 100})
    assert llm.generate([PROMPT], ended)[0].choices[0].token_ids == [eos]
    held = SamplingParams(temperature=0, max_tokens=12, min_tokens=4, logit_bias={eos: 100})
    choice = llm.generate([PROMPT], held)[0].choices[0]
    assert eos not in choice.token_ids[:4]
    assert choice.token_ids[4:] == [eos]


def test_best_of_returns_the_likeliest(llm: LLM) -> None:
    every = llm.generate([PROMPT], SamplingParams(seed=3, n=6, max_tokens=10, logprobs=0))[0].choices
    best = llm.generate([PROMPT], SamplingParams(seed=3, n=2, best_of=6, max_tokens=10))[0].choices
    ranked = sorted(every, key=lambda choice: -choice.mean_logprob)
    assert [choice.token_ids for choice in best] == [choice.token_ids for choice in ranked[:2]]


def test_max_tokens_0_scores_the_prompt_in_bounded_parts(llm: LLM) -> None:
    llm.engine.scheduler.score_tokens = 7
    params = SamplingParams(max_tokens=0, prompt_logprobs=2, n=2)
    llm.generate([PROMPT], GREEDY)
    output = llm.generate([PROMPT], params)[0]
    scores = output.prompt_logprobs
    assert scores is not None
    assert (scores.start, len(scores.values), len(scores.top)) == (1, len(PROMPT) - 1, len(PROMPT) - 1)
    assert [choice.finish_reason for choice in output.choices] == ["length", "length"]
    assert all(choice.token_ids == [] for choice in output.choices)


@pytest.mark.parametrize("overlap", [False, True])
def test_aborts_free_everything_within_a_step(llm: LLM, overlap: bool) -> None:
    engine = llm.engine
    engine.overlap = overlap
    engine.scheduler.max_batch_tokens = 8
    for request, steps in enumerate([0, 1, 3, 12]):
        engine.add(Add(request, PROMPT, SamplingParams(max_tokens=60, n=3, ignore_eos=True)))
        for _ in range(steps):
            engine.step()
        engine.abort(request)
        engine.scheduler.check_integrity()
        assert engine.pool.used_blocks == 0
        while engine.has_work:
            assert all(delta.request != request for delta in engine.step())


def test_aborting_one_choice_leaves_the_others(llm: LLM) -> None:
    engine = llm.engine
    params = SamplingParams(seed=2, n=3, max_tokens=10, ignore_eos=True)
    expected = [c.token_ids for c in llm.generate([PROMPT], params)[0].choices]
    for steps in (0, 4):
        engine.add(Add(1000 + steps, PROMPT, params))
        news: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for _ in range(steps):
            for delta in engine.step():
                news[delta.choice] += delta.token_ids
        engine.abort(1000 + steps, 0)
        while engine.has_work:
            for delta in engine.step():
                news[delta.choice] += delta.token_ids
        assert news[1] == expected[1]
        assert news[2] == expected[2]
        assert len(news[0]) <= steps


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "no tokens"),
        ([-1], GREEDY, "0..319"),
        ([320], GREEDY, "0..319"),
        ([2**63], GREEDY, "0..319"),
        ([1] * 120, GREEDY, "This model's maximum context length is 128"),
        ([1], SamplingParams(logit_bias={320: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop_token_ids=(999,)), "stop_token_ids"),
    ],
)
def test_what_does_not_fit_is_refused(
    llm: LLM, prompt: list[int], params: SamplingParams, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.engine.add(Add(1, prompt, params))


class Saboteur:
    """Wraps the model's forward: raises, or spoils logits, when a marked token is in the step."""

    def __init__(self, engine: Engine, marked: int, error: Exception | None) -> None:
        self._forward = engine.runner._forward
        self._marked, self._error = marked, error
        self.calls = 0
        engine.runner._forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, step: Step, inputs: StepInputs) -> Tensor:
        self.calls += 1
        marked = inputs.input_ids == self._marked
        if self._error is not None and bool(marked.any()):
            raise self._error
        logits = self._forward(step, inputs)
        ends = inputs.query_start[1:].long() - 1
        for row, end in enumerate(inputs.logits_index.tolist()):
            chunk = int((ends >= end).nonzero()[0])
            if bool(marked[int(inputs.query_start[chunk]) : end + 1].any()):
                logits[row] = math.nan
        return logits


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_raises_fails_only_who_raised(llm: LLM, overlap: bool) -> None:
    engine = llm.engine
    engine.overlap = overlap
    expected = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    Saboteur(engine, 300, RuntimeError("kernel failed"))
    news = run(engine, Add(500, PROMPT, GREEDY), Add(501, [1, 300, 2], GREEDY), Add(502, PROMPT[:20], GREEDY))
    assert tokens(news[500, 0]) == expected
    assert news[501, 0][-1].finish == "error"
    assert news[502, 0][-1].finish == "length"


def test_a_row_of_nan_errors_alone_and_is_not_cached(llm: LLM) -> None:
    engine = llm.engine
    expected = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    poisoned = [300, *range(100, 140)]
    Saboteur(engine, 300, None)
    news = run(engine, Add(500, PROMPT, GREEDY), Add(501, poisoned, GREEDY))
    assert tokens(news[500, 0]) == expected
    assert news[501, 0][-1].error == "the model produced no finite logits"
    assert engine.pool.match([*poisoned, 1]).blocks == []


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=0, prompt_logprobs=0),
        SamplingParams(max_tokens=2, prompt_logprobs=3, n=2),
        SamplingParams(max_tokens=2, prompt_logprobs=0, logprobs=0, seed=1),
    ],
)
def test_scores_of_a_prompt_that_are_nan_are_an_error(llm: LLM, params: SamplingParams) -> None:
    """They are no log-probabilities, even where nothing is drawn that would show it."""
    engine = llm.engine
    expected = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    poisoned = [*range(100, 140), 300, 5, 6]
    Saboteur(engine, 300, None)
    news = run(engine, Add(500, PROMPT, GREEDY), Add(501, poisoned, params))
    assert tokens(news[500, 0]) == expected
    for choice in range(params.n):
        last = news[501, choice][-1]
        assert (last.finish, last.error) == ("error", "the model produced no finite logits")
    assert engine.pool.match([*poisoned, 1]).blocks == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("too many tokens"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["device", "python", "torch on a CPU"],
)
def test_out_of_memory_makes_smaller_steps(llm: LLM, error: Exception) -> None:
    engine = llm.engine
    expected = llm.generate([PROMPT], GREEDY)[0].choices[0].token_ids
    engine.pool.reset_cache()
    forward = engine.runner._forward

    def hungry(step: Step, inputs: StepInputs) -> Tensor:
        if len(inputs.input_ids) > 20:
            raise error
        return forward(step, inputs)

    engine.runner._forward = hungry  # type: ignore[method-assign]
    news = run(engine, Add(500, PROMPT, GREEDY))
    assert tokens(news[500, 0]) == expected
    assert engine.scheduler.max_batch_tokens <= 20


@pytest.mark.parametrize(("threads", "expected"), [(None, []), (3, [3])])
def test_threads_of_the_configuration_are_used(
    folder: str, monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: list[int]
) -> None:
    used: list[int] = []
    monkeypatch.setattr("tokenmill.engine.kernel_choice.use_threads", used.append)
    LLM(folder, max_context=128, num_blocks=60, threads=threads)
    assert used == expected

"""What can't go through the paged cache is served just the same, one sequence at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import eager_model, greedy_gap, tiny
from msgspec import structs
from torch import Tensor, nn

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.forward import SequentialForward
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.messages import Add, Delta
from tokenmill.engine.sequential import SequentialModel

CACHED = ("falcon", "llama4_text", "mamba", "rwkv")  # keys and values, chunks of them, two recurrent states
WHOLE = ("xlm", "recurrent_gemma")  # none, and one that it keeps to itself
TYPES = (*CACHED, *WHOLE)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def engine_of(model_type: str, **options: Any) -> LLM:
    return LLM(str(tiny(model_type)), **{"max_context": 96, "max_batch": 6, **options})


@cache
def shared(model_type: str) -> LLM:
    """An engine for tests that leave it as it was."""
    return engine_of(model_type)


@cache
def reference(model_type: str) -> Any:
    return eager_model(tiny(model_type))


def prompts(count: int = 5) -> list[list[int]]:
    generator = random.Random(7)
    return [[generator.randrange(3, 320) for _ in range(n)] for n in (17, 1, 33, 8, 2, 40, 5, 9)[:count]]


def sequential(llm: LLM) -> SequentialModel:
    forward = llm.engine.runner.forward
    assert isinstance(forward, SequentialForward)
    return forward._model


def tokens_of(llm: LLM, texts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.choices[0].token_ids for output in llm.generate(texts, params)]


def logprobs_of(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities [T, V] after each token, by recomputation of every prefix."""
    with torch.inference_mode():
        rows = [model(torch.tensor([ids[: i + 1]]), use_cache=False).logits[0, -1] for i in range(len(ids))]
    return torch.stack(rows).log_softmax(-1)


@pytest.mark.parametrize("model_type", TYPES)
def test_says_which_way_it_takes(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        llm = engine_of(model_type)
    said = [record.getMessage() for record in caplog.records]
    assert sequential(llm).keeps_cache == (model_type in CACHED)
    assert any("one sequence at a time (slow)" in line for line in said)
    assert any("computes its whole text anew" in line for line in said) == (model_type in WHOLE)
    way = "and cache" if model_type in CACHED else "without a cache, each token computing its text anew"
    assert f"its own code {way}, one sequence at a time (slow)" in llm.engine.ready().description


@pytest.mark.parametrize("model_type", TYPES)
def test_many_at_once_are_each_right(model_type: str) -> None:
    llm = shared(model_type)
    for prompt, tokens in zip(prompts(8), tokens_of(llm, prompts(8)), strict=True):
        assert len(tokens) == GREEDY.max_tokens
        assert greedy_gap(reference(model_type), prompt, tokens) < 1e-4
    assert llm.engine.scheduler.preemptions == 0
    assert llm.engine.pool.used_blocks == 0


@pytest.mark.parametrize("model_type", TYPES)
def test_overlapped_steps_change_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = shared(model_type)
    wanted = tokens_of(llm, prompts())
    monkeypatch.setattr(llm.engine, "overlap", True)
    assert tokens_of(llm, prompts()) == wanted


@pytest.mark.parametrize("model_type", TYPES)
def test_a_prompt_that_must_be_split_is_right_too(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = shared(model_type)
    wanted = tokens_of(llm, prompts())
    # What running out of memory leads to.
    monkeypatch.setattr(llm.engine.scheduler, "max_batch_tokens", 7)
    assert tokens_of(llm, prompts()) == wanted


@pytest.mark.parametrize("model_type", TYPES)
def test_choices_fork_from_one_prompt(model_type: str) -> None:
    llm, prompt = shared(model_type), prompts()[0]
    params = SamplingParams(temperature=1.5, seed=5, n=3, max_tokens=8, ignore_eos=True, logprobs=0)
    choices = llm.generate([prompt], params)[0].choices
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    for choice in choices:
        wanted = logprobs_of(reference(model_type), prompt + choice.token_ids)[len(prompt) - 1 : -1]
        chosen = wanted.gather(1, torch.tensor(choice.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(choice.logprobs), chosen, atol=1e-3, rtol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_seed_gives_the_same_text_in_any_company(model_type: str) -> None:
    llm = shared(model_type)
    seeded = SamplingParams(temperature=1.2, seed=11, max_tokens=10, ignore_eos=True)
    alone = tokens_of(llm, prompts(1), seeded)[0]
    assert tokens_of(llm, prompts(6), seeded)[0] == alone
    assert tokens_of(llm, prompts(1), structs.replace(seeded, n=3))[0] == alone
    assert tokens_of(llm, prompts(1), structs.replace(seeded, seed=12))[0] != alone


@pytest.mark.parametrize("model_type", TYPES)
def test_prompts_are_scored(model_type: str) -> None:
    prompt = prompts()[2]
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    scores = shared(model_type).generate([prompt, prompts()[0]], params)[0].prompt_logprobs
    assert scores is not None
    assert scores.start == 1
    with torch.inference_mode():
        whole = reference(model_type)(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
    wanted = whole[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores.values), wanted, atol=1e-3, rtol=0)
    assert [top.ids[0] for top in scores.top] == whole[:-1].argmax(-1).tolist()


@pytest.mark.parametrize("model_type", TYPES)
def test_a_stop_ends_the_text(model_type: str) -> None:
    llm, prompt = shared(model_type), prompts()[3]
    free = llm.generate([prompt], GREEDY)[0].choices[0]
    stop = llm.tokenizer.decode(free.token_ids[4:6])
    cut = llm.generate([prompt], structs.replace(GREEDY, stop=[stop]))[0].choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]


@pytest.mark.parametrize("model_type", ["falcon", "rwkv", "xlm"])
def test_an_abort_frees_what_was_held_and_disturbs_nobody(model_type: str) -> None:
    llm = engine_of(model_type)
    engine, wanted = llm.engine, tokens_of(shared(model_type), prompts(3))
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for request, prompt in enumerate(prompts(3)):
        engine.add(Add(request, prompt, GREEDY))
    for step in range(40):
        if step == 3:
            engine.abort(1)
        collect(engine.step(), found)
        if step == 4:
            assert len(sequential(llm)._texts) == 2
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    assert len(found[1]) < len(wanted[1])
    assert not engine.has_work
    assert engine.pool.used_blocks == 0
    engine.scheduler.check_integrity()


def collect(deltas: list[Delta], found: dict[int, list[int]]) -> None:
    for delta in deltas:
        found[delta.request] += delta.token_ids


@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_that_raises_is_tried_again(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = shared(model_type)
    model: Any = llm.engine.model.module
    wanted = tokens_of(llm, prompts(3))
    forward, calls = model.forward, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("a passing fault")
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", failing)
    assert tokens_of(llm, prompts(3)) == wanted
    assert len(calls) > 9


def test_a_model_that_wants_more_than_tokens_is_refused() -> None:
    with pytest.raises(
        LoadError, match=r"doesn't run on token ids alone \(inputs_embeds and shared_kv_states"
    ):
        engine_of("gemma4_unified_assistant")


class Sums(nn.Module):
    """A causal LM of 16 tokens whose logits follow from the sum of all tokens; its cache is that sum."""

    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=16))

    def __init__(self, remember: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
        self.remember = remember

    def forward(self, input_ids: Tensor, state: Any = None, use_cache: bool = False) -> SimpleNamespace:
        sums = input_ids.cumsum(-1) + (0 if state is None else state)
        return SimpleNamespace(logits=self.weight[sums % 64], state=self.remember(sums[0, -1]))


@pytest.mark.parametrize(
    ("remember", "right"),
    [(lambda x: x, True), (lambda x: x + 1, False), (torch.zeros_like, False), (lambda x: None, False)],
)
def test_a_cache_is_trusted_only_when_it_is_right(
    remember: Callable[[Tensor], Tensor | None], right: bool
) -> None:
    assert SequentialModel(Sums(remember)).keeps_cache == right


def test_a_cache_that_raises_is_not_used() -> None:
    class Fails(Sums):
        def forward(self, input_ids: Tensor, state: Any = None, use_cache: bool = False) -> SimpleNamespace:
            if use_cache:
                raise ValueError("no cache in this release")
            return super().forward(input_ids)

    assert not SequentialModel(Fails(lambda x: x)).keeps_cache

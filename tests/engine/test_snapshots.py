"""Copies of states: what they are found by, and that a request that goes on from one writes the same text."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import eager_model, tiny

from tokenmill.engine import LLM, SamplingParams, snapshots
from tokenmill.engine.messages import Add, Delta
from tokenmill.engine.snapshots import Snapshots

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
BLOCK = 16


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts are copied, too."""
    monkeypatch.setattr(snapshots, "LEAST", BLOCK)


def engine_of(model_type: str = "qwen3_5_text", **options: Any) -> LLM:
    settings = {"max_context": 256, "num_blocks": 100, "max_batch": 6, "dtype": "float32", **options}
    return LLM(str(tiny(model_type)), **settings)


@cache
def reference(model_type: str) -> Any:
    return eager_model(tiny(model_type))


def text(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 320) for _ in range(length)]


def run(
    llm: LLM, prompts: list[list[int]], params: SamplingParams = SHORT
) -> tuple[list[list[int]], list[int]]:
    """The texts, and how much of each prompt was cached; texts are checked against transformers'."""
    engine = llm.engine
    for number, prompt in enumerate(prompts):
        engine.add(Add(number, prompt, params))
    texts: list[list[int]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    while engine.has_work:
        for delta in engine.step():
            assert isinstance(delta, Delta)
            assert delta.error is None
            texts[delta.request] += delta.token_ids
            cached[delta.request] += delta.cached_tokens or 0
        engine.scheduler.check_integrity()
    model = reference("qwen3_5_text")
    for prompt, found in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + found]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found
    return texts, cached


def test_lines_are_free_taken_or_known() -> None:
    store = Snapshots(5, 2)
    first, second = store.take(), store.take()
    assert {first, second} == {5, 6}
    assert store.take() is None
    assert first is not None
    assert second is not None
    store.keep(first, 1)
    store.check_integrity([second])
    assert store.find(1) == first
    store.keep(second, 2)
    assert store.find(1) == first, "used again"
    assert store.take() == second, "whose use was longest ago"
    assert store.find(2) is None
    store.keep(second, 1)
    assert store.find(1) == first
    store.check_integrity([])
    store.forget(1)
    assert store.known == 0
    store.forget(1)
    store.check_integrity([])
    with pytest.raises(AssertionError):
        store.check_integrity([5])


def test_a_prompt_that_goes_on_from_another_one_is_taken_up_at_its_end() -> None:
    llm = engine_of()
    first = text(70)
    assert run(llm, [first])[1] == [0]
    assert run(llm, [first + text(9, 1)])[1] == [64]
    assert run(llm, [first])[1] == [64]


def test_a_dialogue_is_taken_up_where_the_answer_ended() -> None:
    llm = engine_of()
    prompt = text(70)
    (answer,), _ = run(llm, [prompt], GREEDY)
    (_,), cached = run(llm, [prompt + answer + text(5, 2)])
    assert cached == [(70 + 40 - 1) // BLOCK * BLOCK]
    assert llm.engine.scheduler.states is not None
    # Prompts' ends, 64 and 112, and of the way through the answer the last place only.
    assert llm.engine.scheduler.states.known == 3


def test_a_beginning_that_many_share_is_copied_when_it_is_seen_again() -> None:
    llm = engine_of()
    system = text(90)
    cached = [run(llm, [system + text(30, seed)])[1][0] for seed in range(3)]
    assert cached == [0, 0, 80]


def test_in_one_batch_overlapped_and_in_chunks() -> None:
    llm = engine_of(overlap=True)
    llm.engine.scheduler.max_batch_tokens = 24
    shared = text(100)
    prompts = [shared[: 20 * n] + text(7 * n, n) for n in range(1, 6)] * 2
    run(llm, prompts, GREEDY)
    assert max(run(llm, prompts, GREEDY)[1]) >= 100


def test_few_lines_are_used_again_and_again() -> None:
    llm = engine_of()
    states = Snapshots(llm.engine.config.max_batch + 1, 2)
    llm.engine.scheduler.states = states
    prompts = [text(20 + 11 * n, n) for n in range(6)]
    for _ in range(2):
        run(llm, prompts, GREEDY)
    assert states.known == 2


def test_a_preempted_sequence_goes_on_from_its_own_copy() -> None:
    llm = engine_of(num_blocks=11, max_context=120)
    prompts = [text(20, n) for n in range(4)]
    restored = []
    launch = llm.engine.runner.launch
    llm.engine.runner.launch = lambda step: restored.extend(step.restores) or launch(step)
    run(llm, prompts, GREEDY)
    assert llm.engine.scheduler.preemptions > 0
    assert restored


def test_aborted_requests_leave_nothing_taken() -> None:
    llm = engine_of()
    engine = llm.engine
    for number in range(4):
        engine.add(Add(number, text(60, number), GREEDY))
    for step in range(6):
        engine.step()
        engine.abort(step)
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()


def test_without_a_prefix_cache_there_are_none() -> None:
    llm = engine_of(kv_cache={"prefix_cache": False})
    assert llm.engine.scheduler.states is None
    first = text(70)
    run(llm, [first])
    assert run(llm, [first])[1] == [0]


def test_models_of_attention_alone_have_none() -> None:
    assert engine_of("llama").engine.scheduler.states is None


def test_salts_do_not_share() -> None:
    llm = engine_of()
    first = text(70)
    for number, salt in enumerate(["a", "b", "b"]):
        llm.engine.add(Add(number, first, SHORT, cache_salt=salt))
        cached = 0
        while llm.engine.has_work:
            cached += sum(delta.cached_tokens or 0 for delta in llm.engine.step())
        assert cached == (64 if number == 2 else 0)

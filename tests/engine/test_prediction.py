"""Predicted outputs and drafts from the own text change the number of steps and nothing else (float32)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.tiny import make_tiny

PROMPT = list(range(20, 50))
SETTINGS = [
    SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.9, seed=3, max_tokens=60, ignore_eos=True, logprobs=0),
    SamplingParams(
        temperature=0.8,
        seed=4,
        max_tokens=60,
        min_tokens=30,
        logprobs=1,
        presence_penalty=0.8,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={3: 2.0},
    ),
    SamplingParams(temperature=1, seed=5, max_tokens=60, n=3, logprobs=0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("prediction")))


@pytest.fixture
def llm(folder: str) -> Iterator[LLM]:
    one = LLM(folder, max_context=256, num_blocks=200)
    yield one
    one.engine.scheduler.check_integrity()
    assert one.engine.pool.used_blocks == 0


def spoilt(tokens: list[int], seed: int) -> list[int]:
    """Some tokens changed, some left out, some put in."""
    generator = random.Random(seed)
    out = []
    for token in tokens:
        kind = generator.random()
        if kind < 0.05:
            out.append(generator.randrange(300))
        elif kind < 0.1:
            out += [token, generator.randrange(300)]
        elif kind < 0.95:
            out.append(token)
    return out


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "seeded", "penalized", "choices"])
def test_the_output_is_what_it_would_have_been(llm: LLM, params: SamplingParams, overlap: bool) -> None:
    llm.engine.overlap = overlap
    plain = llm.generate([PROMPT], params)[0]
    text = plain.choices[0].token_ids
    for prediction in (text, spoilt(text, 1), spoilt(text, 2), [7] * 40, []):
        crowd = [PROMPT[:k] for k in (3, 9)]
        outputs = llm.generate(
            [PROMPT, *crowd], [params, SETTINGS[1], SETTINGS[2]], predictions=[prediction, text, None]
        )
        for choice, expected in zip(outputs[0].choices, plain.choices, strict=True):
            assert choice.token_ids == expected.token_ids
            assert choice.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            assert choice.text == expected.text


def test_a_right_prediction_saves_steps_and_is_counted(llm: LLM) -> None:
    params = SETTINGS[0]
    before = llm.engine.stats().step
    plain = llm.generate([PROMPT], params)[0]
    between = llm.engine.stats().step
    predicted = llm.generate([PROMPT], params, predictions=[plain.choices[0].token_ids])[0]
    after = llm.engine.stats().step
    assert after - between < (between - before) / 5
    assert predicted.accepted_drafts > 50
    assert predicted.rejected_drafts == 0
    assert plain.accepted_drafts == 0


def test_a_stop_inside_accepted_drafts_ends_there(llm: LLM) -> None:
    text = llm.generate([PROMPT], SETTINGS[0])[0].choices[0].token_ids
    stop = next(t for i, t in enumerate(text) if i > 10 and t not in text[:i])
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
    choice = llm.generate([PROMPT], params, predictions=[text])[0].choices[0]
    assert choice.token_ids == text[: text.index(stop) + 1]
    assert choice.finish_reason == "stop"


def test_drafts_from_the_own_text_change_nothing(folder: str) -> None:
    plain, drafting = (
        LLM(folder, max_context=256, num_blocks=200, speculation_ngram=ngram) for ngram in (False, True)
    )
    repetitive = (PROMPT[:6] * 8)[:40]
    for params in SETTINGS:
        expected, found = (llm.generate([repetitive, PROMPT], params) for llm in (plain, drafting))
        for a, b in zip(expected, found, strict=True):
            assert [c.token_ids for c in a.choices] == [c.token_ids for c in b.choices]


def test_drafts_survive_preemption(folder: str) -> None:
    calm = LLM(folder, max_context=96, num_blocks=100)
    tight = LLM(folder, max_context=96, num_blocks=9, overlap=True)
    params = SamplingParams(temperature=0.7, seed=9, max_tokens=50, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:10], PROMPT[5:25]]
    texts = [o.choices[0].token_ids for o in calm.generate(prompts, params)]
    found = tight.generate(prompts, params, predictions=[spoilt(t, 3) for t in texts])
    assert tight.engine.scheduler.preemptions > 0
    assert [o.choices[0].token_ids for o in found] == texts

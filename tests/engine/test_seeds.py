"""The same request with the same seed gives the same text, whatever happens around it (float32)."""

from __future__ import annotations

import random

import pytest

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.tiny import make_tiny

PROMPT = [7, 3, 250, 99, 101, 14, 15, 16, 200, 201, 12, 55, 56, 57, 58, 59, 60, 61, 90, 91]
PARAMS = SamplingParams(
    temperature=1.1,
    top_p=0.95,
    top_k=100,
    min_p=0.001,
    seed=1234,
    max_tokens=40,
    ignore_eos=True,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    repetition_penalty=1.1,
    logit_bias={5: 1.5, 9: -100},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("qwen3", tmp_path_factory.mktemp("seeds")))


@pytest.fixture
def llm(folder: str) -> LLM:
    return LLM(folder, max_context=128, num_blocks=300)


@pytest.fixture(scope="module")
def alone(folder: str) -> list[int]:
    return tokens_of(LLM(folder, max_context=128, num_blocks=300, kv_cache={"prefix_cache": False}))


def tokens_of(llm: LLM, params: SamplingParams = PARAMS) -> list[int]:
    return llm.generate([PROMPT], params)[0].choices[0].token_ids


def crowd(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = random.Random(3)
    prompts = [[generator.randrange(300) for _ in range(generator.randrange(1, 60))] for _ in range(count)]
    params = [
        SamplingParams(temperature=0.5 + i / count, seed=i, max_tokens=5 + 2 * i, top_k=i)
        for i in range(count)
    ]
    return prompts, params


def test_among_24_others(llm: LLM, alone: list[int]) -> None:
    prompts, params = crowd(24)
    outputs = llm.generate([*prompts[:11], PROMPT, *prompts[11:]], [*params[:11], PARAMS, *params[11:]])
    assert outputs[11].choices[0].token_ids == alone


@pytest.mark.parametrize("chunk", [1, 3, 16, 17])
def test_with_another_chunk_size(llm: LLM, alone: list[int], chunk: int) -> None:
    llm.engine.scheduler.max_batch_tokens = chunk
    assert tokens_of(llm) == alone


def test_after_a_prefix_hit(llm: LLM, alone: list[int]) -> None:
    assert tokens_of(llm) == alone
    again = llm.generate([PROMPT], PARAMS)[0]
    assert again.cached_tokens == 16
    assert again.choices[0].token_ids == alone


@pytest.mark.parametrize("overlap", [False, True])
def test_after_preemption(folder: str, alone: list[int], overlap: bool) -> None:
    llm = LLM(folder, max_context=96, num_blocks=6, overlap=overlap)
    older = SamplingParams(temperature=1, seed=8, max_tokens=60, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3], PROMPT], [older, PARAMS])
    assert llm.engine.scheduler.preemptions > 0
    assert outputs[1].choices[0].token_ids == alone


@pytest.mark.parametrize("overlap", [False, True])
def test_as_choice_0_of_4(llm: LLM, alone: list[int], overlap: bool) -> None:
    llm.engine.overlap = overlap
    four = PARAMS.__class__(**{f: getattr(PARAMS, f) for f in PARAMS.__struct_fields__ if f != "n"}, n=4)
    choices = llm.generate([PROMPT], four)[0].choices
    assert choices[0].token_ids == alone
    assert len({tuple(choice.token_ids) for choice in choices}) == 4


def test_choices_that_had_to_wait_for_a_slot(folder: str, alone: list[int]) -> None:
    wide = LLM(folder, max_context=128, num_blocks=300)
    narrow = LLM(folder, max_context=128, num_blocks=300, max_batch=2)
    four = SamplingParams(seed=5, n=4, max_tokens=20)
    texts = [[c.token_ids for c in llm.generate([PROMPT], four)[0].choices] for llm in (wide, narrow)]
    assert texts[0] == texts[1]


def test_another_seed_gives_another_text(llm: LLM, alone: list[int]) -> None:
    other = SamplingParams(
        **{f: getattr(PARAMS, f) for f in PARAMS.__struct_fields__ if f != "seed"}, seed=1235
    )
    assert tokens_of(llm, other) != alone


def test_without_a_seed_texts_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert tokens_of(llm, params) != tokens_of(llm, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_decoder_gives_the_same_bits_in_any_crowd(folder: str, dtype: str) -> None:
    llm = LLM(folder, max_context=128, num_blocks=300, dtype=dtype)
    assert llm.engine.runner.forward.name == "fused decoder, cpu kernels"
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True, logprobs=4)
    alone = llm.generate([PROMPT], params)[0].choices[0]
    prompts, others = crowd(24)
    for chunk in (512, 40, 5):
        llm.engine.scheduler.max_batch_tokens = chunk
        llm.engine.pool.reset_cache()
        outputs = llm.generate([*prompts, PROMPT, PROMPT], [*others, params, params])
        for output in outputs[-2:]:
            choice = output.choices[0]
            assert choice.token_ids == alone.token_ids
            assert choice.logprobs == alone.logprobs
            assert choice.top == alone.top

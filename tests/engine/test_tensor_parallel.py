"""Two ranks in two processes give what one gives, whatever the engine does; and what happens when one fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from checkpoints import tiny

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.llm import RequestOutput

SETTINGS = {"max_context": 128, "num_blocks": 200, "dtype": "float32", "device": "cpu"}
PROMPTS = [list(range(10, 40)), [5], [7, 8, 9] * 6, [*range(10, 40), 3, 4]]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)


def open_llm(model_type: str, ranks: int, **settings: object) -> LLM:
    return LLM(str(tiny(model_type)), **{**SETTINGS, "tensor_parallel": ranks, **settings})


def require_equal(found: list[RequestOutput], wanted: list[RequestOutput], what: str) -> None:
    """The same tokens, and log-probabilities within 1e-5."""
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one.choices, other.choices, strict=True):
            assert a.token_ids == b.token_ids, what
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5), what
        if other.prompt_logprobs is not None:
            assert one.prompt_logprobs is not None
            assert one.prompt_logprobs.values == pytest.approx(other.prompt_logprobs.values, abs=1e-5), what


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_two_ranks_write_what_one_writes(model_type: str) -> None:
    wanted = open_llm(model_type, 1).generate(PROMPTS, GREEDY)
    llm = open_llm(model_type, 2)
    engine = llm.engine
    try:
        require_equal(llm.generate(PROMPTS, GREEDY), wanted, "one batch")
        again = llm.generate(PROMPTS, GREEDY)
        assert again[0].cached_tokens > 0
        require_equal(again, wanted, "with prefix hits")
        engine.scheduler.max_batch_tokens = 7
        engine.pool.reset_cache()
        require_equal(llm.generate(PROMPTS, GREEDY), wanted, "chunks of 7")
        engine.overlap = True
        require_equal(llm.generate(PROMPTS, GREEDY), wanted, "overlapped, with prefix hits and chunks of 7")
        engine.scheduler.check_integrity()
        assert engine.pool.used_blocks == 0
    finally:
        llm.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LLM, LLM]]:
    """One rank, and two; few blocks, so that long texts are preempted."""
    one, two = (open_llm("llama", ranks, num_blocks=14) for ranks in (1, 2))
    yield one, two
    two.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3, n=3, max_tokens=20, ignore_eos=True, logprobs=0),
        SamplingParams(seed=4, n=1, best_of=2, max_tokens=8, ignore_eos=True, logprobs=0),
        SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, logprobs=0, presence_penalty=0.7, repetition_penalty=1.3
        ),
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=2, logprobs=0),
        SamplingParams(seed=1, top_p=0.8, top_k=20, max_tokens=20, ignore_eos=True, logprobs=0),
    ],
    ids=["n", "best_of", "penalties", "prompt_logprobs", "filters"],
)  # fmt: skip
def test_ways_of_drawing(pair: tuple[LLM, LLM], params: SamplingParams, overlap: bool) -> None:
    one, two = pair
    two.engine.overlap = overlap
    require_equal(two.generate(PROMPTS, params), one.generate(PROMPTS, params), "")


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_texts(pair: tuple[LLM, LLM], overlap: bool) -> None:
    one, two = pair
    two.engine.overlap = overlap
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0)
    before = two.engine.scheduler.preemptions
    require_equal(two.generate(PROMPTS, params), one.generate(PROMPTS, params), "")
    assert two.engine.scheduler.preemptions > before


def test_a_prediction_is_drafted_and_verified(pair: tuple[LLM, LLM]) -> None:
    one, two = pair
    wanted = one.generate(PROMPTS[:1], GREEDY)
    found = two.generate(PROMPTS[:1], GREEDY, predictions=[wanted[0].choices[0].token_ids])
    require_equal(found, wanted, "")
    assert found[0].accepted_drafts > 0

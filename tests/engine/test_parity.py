"""Greedy text of tiny random checkpoints of many types is transformers', whatever the engine does.

Each way of running is forced on: one batch, tiny chunks, prefix hits, preemption, overlap.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import PAGED_TYPES, eager_model, tiny

from tokenmill.engine import LLM, SamplingParams

NEW_TOKENS = 24
SETTINGS = {"max_context": 128, "dtype": "float32"}
LONG = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)


@cache
def reference(model_type: str) -> Any:
    return eager_model(tiny(model_type))


def random_prompts(width: int, count: int = 6) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, the later half of them continuing the same 35."""
    generator = random.Random(5)
    lengths = [1, 15, 16, 17, 33, 60][:count]
    prompts = [[generator.randrange(width) for _ in range(length)] for length in lengths]
    shared = [generator.randrange(width) for _ in range(35)]
    return prompts + [shared + prompt[:12] for prompt in prompts[:3]]


def require_greedy(model: Any, prompts: list[list[int]], texts: list[list[int]]) -> None:
    """Each token is the likeliest after all before it, by eager attention over the whole text: no cache to get
    wrong, and since nothing looks ahead one pass shows it of every token."""
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


@pytest.mark.parametrize("fused_decoder", [True, False], ids=["decoder", "own-code"])
@pytest.mark.parametrize("model_type", PAGED_TYPES)
def test_greedy_is_that_of_recomputation(model_type: str, fused_decoder: bool) -> None:
    llm = LLM(str(tiny(model_type)), num_blocks=200, fused_decoder=fused_decoder, **SETTINGS)
    engine = llm.engine
    prompts = random_prompts(engine.model.logits_width)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)

    def greedy() -> list[list[int]]:
        outputs = llm.generate(prompts, params)
        engine.scheduler.check_integrity()
        assert engine.pool.used_blocks == 0
        return [output.choices[0].token_ids for output in outputs]

    found = greedy()
    require_greedy(reference(model_type), prompts, found)
    for text in found:
        assert len(text) == NEW_TOKENS or text[-1] in engine.model.eos_ids
        assert not set(text[:-1]) & set(engine.model.eos_ids)
    assert greedy() == found, "with prefix hits"
    engine.scheduler.max_batch_tokens = 7
    assert greedy() == found, "with prefix hits and chunks of 7"
    engine.pool.reset_cache()
    assert greedy() == found, "chunks of 7"
    engine.scheduler.max_batch_tokens = 512
    engine.overlap = True
    assert greedy() == found, "overlapped"


@pytest.mark.parametrize("model_type", PAGED_TYPES)
def test_greedy_survives_preemption(model_type: str) -> None:
    """With overlap, too, for some."""
    calm = LLM(str(tiny(model_type)), num_blocks=200, **SETTINGS)
    prompts = random_prompts(calm.engine.model.logits_width)
    undisturbed = [output.choices[0] for output in calm.generate(prompts, LONG)]
    assert [len(choice.token_ids) for choice in undisturbed] == [NEW_TOKENS] * len(prompts)
    require_greedy(reference(model_type), prompts, [choice.token_ids for choice in undisturbed])
    llm = LLM(str(tiny(model_type)), num_blocks=12, **SETTINGS)
    for overlap in (False, True) if model_type in ("llama", "gemma2", "gpt_oss", "gpt2") else (False,):
        llm.engine.overlap, before = overlap, llm.engine.scheduler.preemptions
        llm.engine.pool.reset_cache()
        choices = [output.choices[0] for output in llm.generate(prompts, LONG)]
        assert llm.engine.scheduler.preemptions > before
        for choice, wanted in zip(choices, undisturbed, strict=True):
            assert choice.token_ids == wanted.token_ids
            assert choice.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)

"""Greedy text of tiny random checkpoints of many types equals transformers' generate, whatever the engine does.

Each way of running is forced on: one batch, tiny chunks, prefix hits, preemption, overlap.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import eager_model

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.tiny import make_tiny

TYPES = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "starcoder2",
    "gpt_oss",
    "deepseek_v3",
    "olmo2",
    "cohere",
    "glm4",
    "granite",
]
NEW_TOKENS = 24


def random_prompts(width: int, count: int = 6) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, the later half of them continuing the same 35."""
    generator = random.Random(5)
    lengths = [1, 15, 16, 17, 33, 60][:count]
    prompts = [[generator.randrange(width) for _ in range(length)] for length in lengths]
    shared = [generator.randrange(width) for _ in range(35)]
    return prompts + [shared + prompt[:12] for prompt in prompts[:3]]


def reference_texts(
    model: torch.nn.Module, prompts: list[list[int]], eos: tuple[int, ...]
) -> list[list[int]]:
    """Greedy continuations from full recomputation with eager attention: no cache to get wrong."""
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(int(logits.argmax()))
                if ids[-1] in eos:
                    break
            texts.append(ids[len(prompt) :])
    return texts


@pytest.mark.parametrize("fused_decoder", [True, False], ids=["decoder", "own-code"])
@pytest.mark.parametrize("model_type", TYPES)
def test_greedy_equals_eager_recomputation(model_type: str, fused_decoder: bool, tmp_path: Path) -> None:
    folder = make_tiny(model_type, tmp_path / model_type)
    llm = LLM(str(folder), max_context=128, num_blocks=200, dtype="float32", fused_decoder=fused_decoder)
    engine = llm.engine
    prompts = random_prompts(engine.model.logits_width)
    expected = reference_texts(eager_model(folder), prompts, engine.model.eos_ids)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)

    def greedy() -> list[list[int]]:
        outputs = llm.generate(prompts, params)
        engine.scheduler.check_integrity()
        assert engine.pool.used_blocks == 0
        return [output.choices[0].token_ids for output in outputs]

    assert greedy() == expected, "one batch"
    assert greedy() == expected, "with prefix hits"
    engine.scheduler.max_batch_tokens = 7
    assert greedy() == expected, "with prefix hits and chunks of 7"
    engine.pool.reset_cache()
    assert greedy() == expected, "chunks of 7"
    engine.scheduler.max_batch_tokens = 512
    engine.overlap = True
    assert greedy() == expected, "overlapped"


@pytest.mark.parametrize(
    ("model_type", "overlap"),
    [(name, False) for name in TYPES] + [(name, True) for name in ("llama", "gemma2", "gpt_oss", "gpt2")],
)
def test_greedy_survives_preemption(model_type: str, overlap: bool, tmp_path: Path) -> None:
    folder = make_tiny(model_type, tmp_path / model_type)
    llm = LLM(str(folder), max_context=128, num_blocks=12, dtype="float32", overlap=overlap)
    engine = llm.engine
    prompts = random_prompts(engine.model.logits_width)
    expected = reference_texts(eager_model(folder), prompts, eos=())
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    assert [output.choices[0].token_ids for output in outputs] == expected
    assert engine.scheduler.preemptions > 0
    calm = LLM(str(folder), max_context=128, num_blocks=200, dtype="float32").generate(prompts, params)
    for output, undisturbed in zip(outputs, calm, strict=True):
        assert output.choices[0].logprobs == pytest.approx(undisturbed.choices[0].logprobs, abs=1e-4)

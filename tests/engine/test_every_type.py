"""Each causal-LM type of transformers is served with the right text, or is listed here with a reason."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from checkpoints import eager_model, greedy_gap, tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.tiny import make_tiny

ANOTHER = "completes the thoughts of another model: it takes that one's hidden states, not text"
AUDIO = "speaks in the codebooks of an audio codec, conditioned on another model's text encoder"
NOT_SERVED = {  # type: (why, what the refusal says)
    "gemma3n": ("its vision tower needs the package timm; gemma3n_text is served", "requires the timm"),
    "gemma4_assistant": (ANOTHER, "no tiny"),
    "gemma4_unified_assistant": (ANOTHER, "doesn't run on token ids alone|no tiny"),
    "musicgen": (AUDIO, "no tiny"),
    "musicgen_melody": (AUDIO, "no tiny"),
}
FAST = {  # the fused decoder, the paged cache, caches of each kind, and no cache at all
    "llama", "glm4", "qwen3_moe", "gpt2", "bert", "falcon", "llama4_text", "mamba2", "rwkv", "jamba",
    "qwen3_next", "xlnet", "emu3",
}  # fmt: skip
NEW_TOKENS = 10
ROUNDING = 1e-3
"""Kernels of prompts and of single tokens round differently; a recurrent state carries that on."""


def by_speed(types: set[str]) -> list[object]:
    """The types as parameters, all but the fast ones marked slow."""
    return [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in sorted(types)]


@pytest.mark.parametrize("model_type", by_speed(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_SERVED)))
def test_greedy_text_is_that_of_recomputation(model_type: str) -> None:
    folder = tiny(model_type)
    llm = LLM(str(folder), max_context=64, num_blocks=40, max_batch=4)
    generator = random.Random(3)
    prompts = [[generator.randrange(3, 320) for _ in range(length)] for length in (12, 2, 21)]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    model = eager_model(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        choice = output.choices[0]
        assert choice.error is None
        assert len(choice.token_ids) == NEW_TOKENS
        assert greedy_gap(model, prompt, choice.token_ids) < ROUNDING
    assert llm.engine.pool.used_blocks == 0


@pytest.mark.parametrize("model_type", NOT_SERVED)
def test_what_is_not_served_is_refused_with_one_line(model_type: str, tmp_path: Path) -> None:
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with pytest.raises(LoadError, match=NOT_SERVED[model_type][1]):
        LLM(str(make_tiny(model_type, tmp_path / "model")), max_context=64)

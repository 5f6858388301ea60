"""Checkpoints that also see or hear complete text, by the fused decoder where their language model is a usual one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import load, tiny
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.model_class import causal_lm_class, read_config

FUSED = (
    "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "gemma3", "internvl", "glm4v", "llava",
    "smolvlm", "lfm2_vl", "voxtral", "gemma4",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FUSED)
def test_greedy_text_is_transformers(model_type: str) -> None:
    folder = tiny(model_type)
    llm = LLM(str(folder), dtype="float32", max_context=128, num_blocks=60)
    assert llm.engine.runner.forward.name.startswith("fused decoder")
    prompts = [[7 + i for i in range(n)] for n in (30, 3)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    found = [output.choices[0].token_ids for output in llm.generate(prompts, params)]
    chosen, config = causal_lm_class(read_config(folder))
    build: Any = chosen.from_pretrained
    model = build(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, text in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


@pytest.mark.parametrize("model_type", ["florence2", "t5gemma2", "pi0"])
def test_what_has_an_encoder_or_no_words_is_refused(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    assert type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with pytest.raises(LoadError, match=f"a {model_type} is no causal language model"):
        causal_lm_class(config)


def test_what_pictures_go_through_is_no_part_of_a_step() -> None:
    """A step's size is that of the language model, which the same fields make on their own."""
    size = load(tiny("qwen3_vl"), dtype="float32").size
    module = load(tiny("qwen3_vl"), dtype="float32").module
    assert module is not None
    seen = sum(p.numel() for p in module.model.visual.parameters() if p.dim() > 1)
    everything = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    embedding = module.get_input_embeddings().weight.numel()
    assert seen > 0
    assert size.weights == everything - seen - embedding

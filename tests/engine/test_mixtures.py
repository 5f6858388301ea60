"""Mixtures of experts through the fused decoder: each way to choose experts, store them and gate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import eager_model, load, texts, tiny
from safetensors.torch import load_file
from torch import nn

from tokenmill.engine import LLM, SamplingParams, attention, guards
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.decoder_spec import DecoderSpec, Experts
from tokenmill.engine.describe import describe
from tokenmill.engine.describe_experts import experts
from tokenmill.engine.describe_parts import NotUnderstood
from tokenmill.engine.kernel_set import ReferenceKernels

GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_oss", {}),
    ("glm4_moe", {}),
    ("glm4_moe", {**GROUPED, "norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ("ernie4_5_moe", {}),
    ("granitemoe", {}),
    ("granitemoeshared", {"shared_intermediate_size": 128}),
    ("dots1", {"routed_scaling_factor": 1.5}),
    ("exaone_moe", {}),
    ("minimax_m2", {}),
    ("solar_open", {}),
    ("mellum", {}),
    ("hy_v3", {}),
]


def described(folder: Path) -> tuple[DecoderSpec, list[attention.LayerSpec]]:
    model = load(folder, dtype="float32", max_context=128)
    assert model.module is not None
    assert model.verdict.decoder is not None, "it runs through the fused decoder"
    layers = attention.probe_layers(model.module)
    return describe(model.module, layers, model.max_context, model.verdict.decoder == "interleaved"), layers


def mixtures_of(spec: DecoderSpec) -> list[Experts]:
    return [layer.mlp for layer in spec.layers if isinstance(layer.mlp, Experts)]


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_logits_are_transformers(model_type: str, overrides: dict[str, Any]) -> None:
    folder = tiny(model_type, **overrides)
    spec, layers = described(folder)
    assert mixtures_of(spec)
    prompts = texts(spec.head.weight.shape[0])
    with torch.inference_mode():
        found = guards.run_paged(Decoder(spec, ReferenceKernels()), layers, prompts)
        model = eager_model(folder)
        wanted = [model(text[None], use_cache=False).logits[0] for text in prompts]
    assert guards.relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize(("model_type", "overrides"), CASES)
def test_greedy_text_is_transformers(
    model_type: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", "cpu")
    folder = tiny(model_type, **overrides)
    llm = LLM(str(folder), dtype="float32", max_context=128, num_blocks=100)
    assert llm.engine.runner.forward.name == "fused decoder, cpu kernels"
    prompts = [text.tolist() for text in texts(llm.engine.model.logits_width)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    model = eager_model(folder)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        text = output.choices[0].token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


def test_groups_and_corrections_are_read() -> None:
    spec, _ = described(tiny("glm4_moe", **GROUPED, norm_topk_prob=False, routed_scaling_factor=2.5))
    for mixture in mixtures_of(spec):
        routing = mixture.routing
        assert (routing.scoring, routing.top, routing.groups, routing.top_groups) == ("sigmoid", 3, 4, 2)
        assert (routing.renormalize, routing.scale) == (False, 2.5)
        assert routing.bias is not None
        assert routing.bias.abs().min() > 0, "a tiny checkpoint has a correction to get wrong"


def test_interleaved_gates_come_apart() -> None:
    spec, _ = described(tiny("gpt_oss"))
    stored = load_file(tiny("gpt_oss") / "model.safetensors")
    first = mixtures_of(spec)[0]
    assert first.activation == "swiglu_oai"
    first.arrange()
    gate_up = stored["model.layers.0.mlp.experts.gate_up_proj"]
    bias = stored["model.layers.0.mlp.experts.gate_up_proj_bias"]
    width = gate_up.shape[2] // 2
    assert torch.equal(first.gate_up[2, :width], gate_up[2, :, ::2].T)
    assert torch.equal(first.gate_up[2, width:], gate_up[2, :, 1::2].T)
    assert first.gate_up_bias is not None
    assert torch.equal(first.gate_up_bias[1, width:], bias[1, 1::2])
    assert torch.equal(first.down[1], stored["model.layers.0.mlp.experts.down_proj"][1].T)


@pytest.mark.parametrize(("field", "value"), [("swiglu_limit", 5.0), ("swiglu_alpha", 1.5)])
def test_another_gate_runs_by_the_models_own_code(field: str, value: float) -> None:
    assert load(tiny("gpt_oss", **{field: value}), dtype="float32").verdict.decoder is None


def test_a_router_that_chooses_otherwise_is_not_understood() -> None:
    module = load(tiny("qwen3_moe"), dtype="float32").module
    assert module is not None
    block: Any = module.model.layers[0].mlp
    experts(block)
    forward = block.gate.forward

    def sharper(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, ids = forward(hidden)
        return logits, weights.square(), ids

    block.gate.forward = sharper
    with pytest.raises(NotUnderstood, match="router Qwen3MoeTopKRouter"):
        experts(block)


def test_unknown_parts_are_not_understood() -> None:
    module = load(tiny("qwen3_moe"), dtype="float32").module
    assert module is not None
    block: Any = module.model.layers[0].mlp
    block.extra = nn.Linear(2, 2)
    with pytest.raises(NotUnderstood, match="with extra"):
        experts(block)

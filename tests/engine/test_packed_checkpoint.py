"""Checkpoints whose linear weights are packed hold the values that their packing stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, load, refusal
from packed_files import KINDS, packed
from safetensors.torch import load_file, save_file

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.block_weight import Blocks
from tokenmill.engine.load_error import LoadError

KEPT = [kind for kind in KINDS if "fp8" not in kind and "float" not in kind and "naive" not in kind]
"""What the CPU's kernels read as it is packed."""


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch keeps nothing packed."""
    monkeypatch.setenv("TOKENMILL_KERNELS", "torch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unpacked")
def test_the_module_holds_what_the_packing_stands_for(kind: str, tmp_path: Path) -> None:
    folder, plain = packed(kind, tmp_path)
    found, wanted = load(folder, dtype="float32"), load(plain, dtype="float32")
    assert found.module is not None
    assert wanted.module is not None
    expected = wanted.module.state_dict()
    assert found.module.state_dict().keys() == expected.keys()
    for name, tensor in found.module.state_dict().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found.verdict == wanted.verdict
    assert found.copied


@pytest.mark.parametrize(("kind", "model_type"), [("fp8", "qwen3_moe"), ("pack-quantized", "qwen3_moe")])
@pytest.mark.usefixtures("unpacked")
def test_experts_are_gathered_from_packed_ones(kind: str, model_type: str, tmp_path: Path) -> None:
    folder, plain = packed(kind, tmp_path, model_type)
    found, wanted = load(folder, dtype="float32").module, load(plain, dtype="float32").module
    assert found is not None
    assert wanted is not None
    expected = wanted.state_dict()
    assert any("experts" in name for name in expected)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_text_is_that_of_the_unpacked_checkpoint(
    quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", "torch" if quantization is None else "cpu")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    texts = []
    for folder in packed("gptq", tmp_path):
        llm = LLM(str(folder), dtype="float32", max_context=64, num_blocks=20, quantization=quantization)
        texts.append([x.choices[0].token_ids for x in llm.generate([[5, 6, 7], [9]], params)])
    assert texts[0] == texts[1]


def check_values(blocks: dict[str, Blocks], expected: dict[str, torch.Tensor], ends: tuple[str, ...]) -> None:
    """What stays packed is what ends so, and stands for what the plain checkpoint has."""
    assert blocks.keys() == {name for name in expected if name.endswith(ends)}
    for name, weight in blocks.items():
        torch.testing.assert_close(weight.values(), expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KEPT)
def test_weights_stay_packed(kind: str, tmp_path: Path) -> None:
    folder, plain = packed(kind, tmp_path)
    found, wanted = load(folder, dtype="float32"), load(plain, dtype="float32")
    assert wanted.module is not None
    if kind == "gptq-desc":
        assert not found.blocks, "groups whose inputs lie apart are unpacked"
    else:
        check_values(found.blocks, wanted.module.state_dict(), ("_proj.weight",))
        assert found.size.weight_bytes < 0.8 * wanted.size.weight_bytes
        assert found.description.endswith("weights")


@pytest.mark.parametrize("kind", ["pack-quantized", "gptq", "int-quantized"])
def test_experts_stay_packed(kind: str, tmp_path: Path) -> None:
    folder, plain = packed(kind, tmp_path, "qwen3_moe")
    found, wanted = load(folder, dtype="float32"), load(plain, dtype="float32").module
    assert wanted is not None
    ends = ("_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    check_values(found.blocks, wanted.state_dict(), ends)


def test_experts_of_which_one_is_in_full_are_unpacked(tmp_path: Path) -> None:
    folder, plain = packed("pack-quantized", tmp_path, "qwen3_moe")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors, full = (load_file(x / "model.safetensors") for x in (folder, plain))
    for end in ("_packed", "_scale", "_shape"):
        del tensors[name + end]
    save_file({**tensors, name: full[name]}, folder / "model.safetensors", {"format": "pt"})
    found, wanted = load(folder, dtype="float32"), load(plain, dtype="float32").module
    assert wanted is not None
    assert "model.layers.0.mlp.experts.gate_up_proj" not in found.blocks
    assert found.module is not None
    name = "model.layers.0.mlp.experts.gate_up_proj"
    torch.testing.assert_close(found.module.state_dict()[name], wanted.state_dict()[name])


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("gptq", "llama"),
        ("nvfp4", "qwen2"),
        ("awq", "gemma2"),
        ("asymmetric", "qwen3_moe"),
        ("mxfp4", "mixtral"),
        ("int-quantized", "qwen3_5_text"),
        ("gptq-desc", "llama"),
    ],
)
def test_logprobs_are_those_of_the_unpacked_checkpoint(kind: str, model_type: str, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    found = []
    for folder in packed(kind, tmp_path, model_type):
        llm = LLM(str(folder), dtype="float32", max_context=64, num_blocks=20)
        answers = llm.generate([[5, 6, 7] * 9, [9]], params)
        found.append([(x.choices[0].token_ids, torch.tensor(x.choices[0].logprobs)) for x in answers])
    for (ours, near), (theirs, exact) in zip(*found, strict=True):
        assert ours == theirs
        # Kept scales are rounded to half precision; published ones are in 16 bits.
        torch.testing.assert_close(near, exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("kind", "kept"), [("gptq", True), ("float-quantized", True), ("fp8", False)])
def test_a_gpu_keeps_what_its_products_read(
    kind: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales by blocks aren't, so those weights are unpacked when they are wanted."""
    monkeypatch.setenv("TOKENMILL_KERNELS", "triton")
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    texts, plain = [], []
    for folder in packed(kind, tmp_path):
        llm = LLM(str(folder), dtype="float32", max_context=64, num_blocks=20)
        texts.append(llm.generate([[5, 6, 7]], params)[0].choices[0].token_ids)
        forward: Any = llm.engine.runner.forward
        plain.append(all(isinstance(block.feed.up.weight, torch.Tensor) for block in forward._logits._blocks))
    assert texts[0] == texts[1]
    assert plain == [not kept, True]


def test_its_own_dtype_is_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.engine.loader.computes_bfloat16", lambda device: True)
    folder, _ = packed("awq", tmp_path)
    model = load(folder)
    assert model.dtype is torch.bfloat16
    assert "bfloat16 (from AWQ) on cpu" in model.description


@pytest.mark.parametrize(
    ("kind", "end"), [("fp8", "weight_scale_inv"), ("pack-quantized", "weight_shape"), ("awq", "qzeros")]
)
def test_missing_scales_are_refused_by_name(kind: str, end: str, tmp_path: Path) -> None:
    folder, _ = packed(kind, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(x for x in sorted(tensors) if x.endswith(end))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    wanted = name.replace("_scale_inv", "_scale")
    assert f"lack {wanted}" in refusal(folder)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_scales_that_do_not_fit_are_refused(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
    folder, _ = packed("awq", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(x for x in sorted(tensors) if x.endswith("scales"))
    tensors[name] = tensors[name][:, :-8].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="don't fit together"):
        LLM(str(folder), dtype="float32", max_context=64, num_blocks=20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "packed (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 3}, "(gptq) in 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
            "rotated (transform_config)",
        ),
    ],
)
def test_what_is_not_read_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder, _ = packed("fp8", tmp_path)
    edit_json(folder / "config.json", quantization_config=changes)
    assert words in refusal(folder)

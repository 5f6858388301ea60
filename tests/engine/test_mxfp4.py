"""Checkpoints whose experts are stored in MXFP4: kept so by kernels that read it, unpacked for others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import load, refusal
from mxfp4_files import gpt_oss_in_mxfp4
from safetensors.torch import load_file, save_file

from tokenmill.engine import LLM, SamplingParams


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return gpt_oss_in_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_module_holds_what_the_blocks_stand_for(
    folders: tuple[Path, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", "torch")
    packed, plain = (load(folder, dtype=dtype) for folder in folders)
    assert packed.module is not None
    assert plain.module is not None
    wanted = plain.module.state_dict()
    found = packed.module.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert packed.verdict == plain.verdict
    assert packed.verdict.decoder == "halves"
    assert packed.fingerprint == plain.fingerprint


def test_experts_stay_packed(folders: tuple[Path, Path]) -> None:
    found, plain = (load(folder, dtype="float32") for folder in folders)
    assert plain.module is not None
    wanted = plain.module.state_dict()
    ends = ("experts.gate_up_proj", "experts.down_proj")
    assert found.blocks.keys() == {name for name in wanted if name.endswith(ends)}
    for name, experts in found.blocks.items():
        assert torch.equal(experts.values().mT, wanted[name])
    assert found.size.expert_bytes < 0.15 * plain.size.expert_bytes
    assert "mxfp4 weights" in found.description


def test_its_own_dtype_is_bfloat16(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.engine.loader.computes_bfloat16", lambda device: True)
    model = load(folders[0])
    assert model.dtype is torch.bfloat16
    assert "bfloat16 (from MXFP4) on cpu" in model.description


@pytest.mark.parametrize("kernels", ["torch", "cpu", "triton"])
def test_text_is_that_of_the_unpacked_checkpoint(
    kernels: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
    params = SamplingParams(temperature=0, max_tokens=2 if kernels == "triton" else 8, ignore_eos=True)
    texts = []
    for folder in folders:
        llm = LLM(str(folder), dtype="float32", max_context=64, num_blocks=20)
        assert "fused decoder" in llm.engine.runner.forward.name
        texts.append([x.choices[0].token_ids for x in llm.generate([[5, 6, 7], [9]], params)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_missing_scales_are_refused(
    kernels: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoints import copy_of

    monkeypatch.setenv("TOKENMILL_KERNELS", kernels)

    damaged = copy_of(folders[0], tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert "don't make a GptOssForCausalLM" in refusal(damaged) or "lack" in refusal(damaged)

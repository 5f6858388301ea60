"""Weights that stay in a GGUF file's blocks, against transformers' reader, which unpacks them (float32)."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import eager_model, tiny
from gguf_files import ARCHITECTURES, Q4_1, gguf_of, unpacked_model
from mxfp4_files import gpt_oss_in_mxfp4
from safetensors.torch import load_file

from tokenmill.engine import LLM, SamplingParams, gguf, gguf_cache
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.tiny import make_tiny
from tokenmill.engine.weight_files import read_gguf_header

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = [[7, 3, 250, 99, 101, 14, 15, 16, 200, 201], list(range(20, 65)), [9]]
AS_PUBLISHED = {
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "qwen3": {"head_dim": 128},
    "gemma2": {"tie_word_embeddings": True},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_5_text": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 32},
}
"""What transformers' reader takes for granted, since every published model of the type has it."""
EMBEDDING = "model.embed_tokens.weight"


def packed(file: Path) -> LLM:
    return LLM(str(file), quantization="gguf", dtype="float32", max_context=128, num_blocks=100)


def check_greedy(llm: LLM, model: torch.nn.Module, tolerance: float = 2e-5) -> None:
    """Tokens and log-probabilities of greedy texts are the model's."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        choice = output.choices[0]
        ids = prompt + choice.token_ids
        with torch.inference_mode():
            rows = model(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert choice.token_ids == rows.argmax(-1).tolist()
        exact = rows.log_softmax(-1)[range(len(choice.token_ids)), choice.token_ids]
        assert choice.logprobs == pytest.approx(exact.tolist(), abs=tolerance)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_what_transformers_unpacks(model_type: str, tmp_path: Path) -> None:
    kinds = {EMBEDDING: "Q8_0", "lm_head.weight": "Q4_0", Q4_1: "Q4_1"}
    file = gguf_of(model_type, tmp_path / "model.gguf", kinds, **AS_PUBLISHED.get(model_type, {}))
    llm = packed(file)
    assert llm.engine.runner.forward.name == "fused decoder, cpu kernels"
    check_greedy(llm, unpacked_model(file), tolerance=5e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_converted_file_holds_what_transformers_unpacks(model_type: str, tmp_path: Path) -> None:
    kinds = {EMBEDDING: "Q8_0", "lm_head.weight": "Q4_0", Q4_1: "Q4_1"}
    file = gguf_of(model_type, tmp_path / "model.gguf", kinds, **AS_PUBLISHED.get(model_type, {}))
    assert gguf.is_known(gguf_cache.read_summary(file))
    model, _ = gguf_cache.convert(file, torch.float32, lambda stage, share: None)
    wanted = unpacked_model(file).state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_a_file_with_a_tensor_of_unknown_use_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = gguf_of("llama", tmp_path / "model.gguf", extra={"rope_factors_long.weight": torch.ones(8)})
    assert not gguf.is_known(gguf_cache.read_summary(file))
    monkeypatch.setattr(gguf_cache, "read_weights", None)
    model, _ = gguf_cache.convert(file, torch.float32, lambda stage, share: None)
    stored = load_file(tiny("llama") / "model.safetensors")
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_block_types(kind: str, tied: bool, tmp_path: Path) -> None:
    file = gguf_of(
        "llama", tmp_path / "model.gguf", {".*(proj|lm_head|tokens).weight": kind}, tie_word_embeddings=tied
    )
    check_greedy(packed(file), unpacked_model(file))


def test_siblings_of_different_types(tmp_path: Path) -> None:
    """As in Q4_K_M files: values and down in more bits than the rest."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    kinds = {
        EMBEDDING: "Q6_K",
        "lm_head.weight": "Q6_K",
        ".*(v_proj|down_proj).weight": "Q6_K",
        ".*layers.0.*up_proj.weight": "Q5_K",
        ".*layers.1.*k_proj.weight": "Q8_0",
        ".*proj.weight": "Q4_K",
    }
    file = gguf_of("llama", tmp_path / "model.gguf", kinds, **sizes)
    llm = packed(file)
    assert type(llm.engine.runner.forward._logits).__name__ == "TapedDecoder"
    check_greedy(llm, unpacked_model(file), tolerance=2e-2)  # group scales are rounded to half precision


def test_experts_in_blocks_of_several_types(tmp_path: Path) -> None:
    """As in Q4_K_M files: what leads back takes more bits in some layers. Scales of all experts share one unit."""
    kinds = {
        ".*layers.0.*experts.down_proj.weight": "Q6_K",
        ".*experts.(gate|up|down)_proj.weight": "Q4_K",
        ".*(embed_tokens|proj).weight": "Q8_0",
    }
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "moe_intermediate_size": 256}
    file = gguf_of("qwen3_moe", tmp_path / "model.gguf", kinds, norm_topk_prob=True, **sizes)
    llm = packed(file)
    assert type(llm.engine.runner.forward._logits).__name__ == "TapedDecoder"
    check_greedy(llm, unpacked_model(file, expert_size=256), tolerance=2e-2)


def test_a_mixture_unpacked(tmp_path: Path) -> None:
    """Without a quantization, by way of transformers' reader, which doesn't know how large experts are."""
    file = gguf_of("qwen2_moe", tmp_path / "model.gguf", {Q4_1: "Q4_1"})
    check_greedy(LLM(str(file), dtype="float32", max_context=128, num_blocks=100), unpacked_model(file))


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """transformers' reader doesn't read such files; the oracle is the checkpoint that they were made from."""
    _, plain = gpt_oss_in_mxfp4(tmp_path)
    file = gguf_of("gpt_oss", tmp_path / "model.gguf", {".*experts.*weight": "MXFP4"}, folder=plain)
    assert {x.kind for x in read_gguf_header(file).tensors} == {"MXFP4", "F32"}
    model = eager_model(plain)
    check_greedy(packed(file), model)
    check_greedy(LLM(str(file), dtype="float32", max_context=128, num_blocks=100), model)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_heads_whose_inputs_are_in_another_order(kind: str, tmp_path: Path) -> None:
    """A block of 32 inputs is moved whole; one that reaches over several heads is unpacked."""
    sizes = {**AS_PUBLISHED["qwen3_5_text"], "linear_value_head_dim": 64}
    file = gguf_of("qwen3_5_text", tmp_path / "model.gguf", {".*linear_attn.out_proj.weight": kind}, **sizes)
    check_greedy(packed(file), unpacked_model(file))


def test_gates_of_another_type_are_refused(tmp_path: Path) -> None:
    kinds = {".*experts.gate_proj.weight": "Q8_0", ".*experts.up_proj.weight": "Q4_0"}
    file = gguf_of("qwen3_moe", tmp_path / "model.gguf", kinds, **AS_PUBLISHED["qwen3_moe"])
    with pytest.raises(LoadError, match="and its up_proj aren't of one type"):
        packed(file)


def test_plain_tensors_stay_plain(tmp_path: Path) -> None:
    """A file of whose layers some are in blocks and some aren't."""
    kinds = {".*layers.0.*(q_proj|gate_proj|down_proj).weight": "Q8_0"}
    file = gguf_of("llama", tmp_path / "model.gguf", kinds)
    check_greedy(packed(file), unpacked_model(file))


@pytest.mark.parametrize("quantization", [None, "gguf"])
def test_stretched_rope_of_llama_3(quantization: str | None, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = make_tiny("llama", tmp_path / "llama", rope_parameters=rope)
    model = eager_model(folder)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert divisors.max() == pytest.approx(4.0)
    file = gguf_of("llama", tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors}, folder=folder)
    llm = LLM(str(file), quantization=quantization, dtype="float32", max_context=128, num_blocks=100)
    check_greedy(llm, model)


def test_a_start_reads_no_more_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are never converted, and the second start converts nothing."""
    file = gguf_of("llama", tmp_path / "model.gguf", {Q4_1: "Q4_1"})
    monkeypatch.setattr("tokenmill.engine.gguf_cache.convert", None)
    first = packed(file).engine.model
    monkeypatch.setattr("tokenmill.engine.gguf_cache._describe", None)
    second = packed(file).engine.model
    assert first.fingerprint == second.fingerprint
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
    assert first.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert first.eos_ids == (2,)


def test_the_fingerprint_tells_blocks_apart(tmp_path: Path) -> None:
    file = gguf_of("llama", tmp_path / "model.gguf", {Q4_1: "Q4_1"})
    before = packed(file).engine.model.fingerprint
    unpacked = LLM(str(file), dtype="float32", max_context=128, num_blocks=100).engine.model.fingerprint
    tensor = next(x for x in read_gguf_header(file).tensors if x.name == "blk.1.ffn_down.weight")
    data = bytearray(file.read_bytes())
    data[tensor.begin] ^= 1  # among the values that a fingerprint samples
    file.write_bytes(data)
    assert len({before, unpacked, packed(file).engine.model.fingerprint}) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = gguf_of("llama", tmp_path / "model.gguf", {Q4_1: "Q4_1"})
    (tmp_path / "plain").touch()
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "plain" / "cache"))
    with caplog.at_level(logging.WARNING):
        check_greedy(packed(file), unpacked_model(file))
    assert any("can't be written" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": {EMBEDDING: "Q2_K"}}, "token_embd.weight is in Q2_K blocks, which no product here reads"),
        (
            {"extra": {"blk.0.attn_rot.weight": torch.zeros(4)}},
            "blk.0.attn_rot.weight, which isn't understood",
        ),
        ({"extra": {"mystery": torch.zeros(4)}}, "mystery, which isn't understood"),
        (
            {"extra": {"blk.7.attn_norm.weight": torch.zeros(64)}},
            "model.layers.7.input_layernorm.weight, which a llama hasn't",
        ),
    ],
)
def test_refusals(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=words) as caught:
        packed(gguf_of(**{"model_type": "llama", "file": tmp_path / "model.gguf", **change}))
    assert "\n" not in str(caught.value)


def test_an_architecture_that_cannot_be_kept_packed_is_refused(tmp_path: Path) -> None:
    file = gguf_of("llama", tmp_path / "model.gguf", {Q4_1: "Q4_1"})
    file.write_bytes(file.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(LoadError, match="doesn't know the architecture bloom"):
        packed(file)


def mapped() -> set[str]:
    """Files of weights that this process has in its memory map."""
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in names if name.endswith((".gguf", ".safetensors"))}


@pytest.mark.parametrize("quantization", [None, "gguf"])
def test_no_file_stays_mapped(quantization: str | None, tmp_path: Path) -> None:
    """Once packed, weights are held once: the pages of the file they came from would count as memory, too."""
    file = gguf_of("qwen2", tmp_path / "model.gguf", {Q4_1: "Q4_1"}, tie_word_embeddings=True)
    before = mapped()  # other tests' models
    llm = LLM(str(file), quantization=quantization, dtype="float32", max_context=64, num_blocks=20)
    assert llm.engine.runner.forward.name == "fused decoder, cpu kernels"
    gc.collect()  # modules of transformers refer to each other in circles
    assert mapped() <= before

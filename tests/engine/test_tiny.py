"""Tiny checkpoints load by transformers, speak varied text, and their tokenizer brings any text back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import PAGED_TYPES, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tokenmill.engine.load_error import LoadError
from tokenmill.engine.tiny import main, make_tiny

TYPES = (*PAGED_TYPES, "falcon")


@pytest.mark.parametrize("model_type", TYPES)
def test_text_varies_and_follows_the_prompt(model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type))
    tokenizer = AutoTokenizer.from_pretrained(tiny(model_type))

    def greedy(prompt: str) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        return list(out[0, ids.shape[1] :].tolist())

    texts = [greedy(f"{first} mill stands by") for first in ("The", "A", "Die", "水")]
    assert max(len(set(text)) for text in texts) >= 5
    assert len({tuple(text[10:]) for text in texts}) >= 3, "the first word still matters after ten tokens"


@pytest.mark.parametrize("model_type", TYPES)
def test_the_tokenizer_works_in_transformers(model_type: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny(model_type))
    text = "The mill 水車 <|im_end|>\n\n  ok 🌾"
    ids = tokenizer(text).input_ids
    assert len(tokenizer) == 320, "no id lies beyond the embedding"
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert 4 in ids, "special tokens are parsed"
    message = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert message == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@given(st.text())
def test_any_text_goes_round(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny("llama") / "tokenizer.json"))
    assert (
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        == text
    )


def test_the_files_are_those_of_a_checkpoint() -> None:
    folder = tiny("qwen3")
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (2, 64, 320)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 4]


def test_sizes_and_overrides(tmp_path: Path) -> None:
    folder = make_tiny(
        "llama",
        tmp_path,
        layers=3,
        hidden=32,
        vocab=300,
        dtype="bfloat16",
        num_key_value_heads=1,
        rope_theta=5.0,
    )
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 32, 300)
    assert config.num_key_value_heads == 1
    assert {x.dtype for x in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.bfloat16}
    assert len(AutoTokenizer.from_pretrained(folder)) == 300


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("gpt_oss", {"sliding_attention", "full_attention"}),
        ("mistral", {None}),
    ],
)
def test_windows_are_short_and_kinds_of_layers_stay(model_type: str, kinds: set[str | None]) -> None:
    config = AutoConfig.from_pretrained(tiny(model_type))
    assert config.sliding_window == 8
    assert set(getattr(config, "layer_types", None) or [None]) >= kinds - {None}


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = [
        make_tiny("llama", tmp_path / str(i), seed=seed).joinpath("model.safetensors").read_bytes()
        for i, seed in enumerate((0, 0, 1))
    ]
    assert files[0] == files[1] != files[2]


def test_making_one_leaves_torchs_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    make_tiny("llama", tmp_path)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("lama", {}, "unknown to this transformers"),
        ("vit", {}, "no causal language model"),
        ("llama", {"vocab": 200}, "vocab must be at least 262"),
        ("llama", {"hidden": 30}, "no tiny"),
    ],
)
def test_refuses(tmp_path: Path, model_type: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(LoadError, match=words):
        make_tiny(model_type, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--type", "qwen3", "--out", str(tmp_path / "q"), "--layers", "1", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'q'}: a random qwen3 of 1 layers, float16\n"
    assert AutoConfig.from_pretrained(tmp_path / "q").num_hidden_layers == 1


def test_the_command_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain").touch()
    for arguments, words in (
        (["--type", "nosuch", "--out", str(tmp_path / "x")], "'nosuch' is unknown"),
        (["--type", "llama", "--out", str(tmp_path / "plain" / "x")], "can't be written"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("bamba", {"mamba.in_proj", "self_attn.q_proj"}),
        ("jamba", {"mamba.in_proj", "self_attn.q_proj", "feed_forward.router", "feed_forward.gate_proj"}),
        ("lfm2_moe", {"conv.in_proj", "self_attn.q_proj", "feed_forward.w1", "feed_forward.experts"}),
        ("recurrent_gemma", {"temporal_block.linear_x", "temporal_block.q_proj"}),
        ("zamba2", {"mamba.in_proj", "shared_transformer.self_attn.q_proj"}),
    ],
)
def test_a_hybrid_keeps_a_layer_of_each_kind(model_type: str, kinds: set[str]) -> None:
    names = load_file(tiny(model_type) / "model.safetensors")
    assert {kind for kind in kinds if any(kind in name for name in names)} == kinds


@pytest.mark.parametrize("hidden", [32, 128])
@pytest.mark.parametrize("model_type", ["bamba", "zamba2", "rwkv", "qwen4_exp_text", "dbrx", "jamba"])
def test_sizes_fit_each_other_at_any_width(model_type: str, hidden: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(model_type, hidden=hidden))
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 320)


def test_the_text_part_of_a_larger_config_is_found_again() -> None:
    folder = tiny("emu3")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "emu3"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "emu3_text_model"

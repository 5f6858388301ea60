"""Tiny checkpoints for tests: made once a session, copied where a test wants to damage them."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tokenmill.engine import attention, guards, loader
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.tiny import make_tiny

PAGED_TYPES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3",
    "gpt2", "opt", "starcoder2", "gpt_oss", "deepseek_v3", "olmo2", "cohere", "glm4", "granite",
)  # fmt: skip
TEXTS = ("The mill stands by the river.", "水車 🌾 <|im_end|>\n\n  a", "")


def load(source: Path | str, **options: Any) -> LoadedModel:
    """A model, loaded as an engine does it."""
    return loader.load(EngineConfig(source=str(source), **options), lambda stage, fraction: None)


def refusal(source: Path | str, **options: Any) -> str:
    """The one line by which it isn't loaded."""
    with pytest.raises(LoadError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(width: int) -> list[torch.Tensor]:
    """Random ids below `width`, as long as the guards' texts."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, width, (n,), generator=generator) for n in guards.LENGTHS]


@cache
def session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tokenmill-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tiny(model_type: str, **overrides: Any) -> Path:
    """The folder of a tiny checkpoint that every test of the session shares: don't write into it."""
    name = "-".join([model_type, *(f"{k}={v}" for k, v in sorted(overrides.items()))])
    return make_tiny(model_type, session_folder() / name, **overrides)


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, target))


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk; None takes a key out."""
    fields = json.loads(file.read_text()) if file.exists() else {}
    for key, value in changes.items():
        fields.pop(key, None)
        if value is not None:
            fields[key] = value
    file.write_text(json.dumps(fields))


def tiny_gguf(file: Path) -> Path:
    """The tiny llama as a GGUF file of float32 tensors with its tokenizer, as llama.cpp writes it."""
    from gguf import GGUFWriter, TokenType

    folder = tiny("llama")
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda x: x[1])
    special = {x["content"] for x in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(
        [TokenType.CONTROL if token in special else TokenType.NORMAL for token, _ in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_gguf_name(name), _as_llama_cpp(name, weight, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def _as_llama_cpp(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp turns neighbouring pairs of a head, transformers its halves: rows change places."""
    if "q_proj" in name or "k_proj" in name:
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        half = weight.shape[0] // heads // 2
        return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)
    return weight


def paged_logits(module: torch.nn.Module, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [T, V] of each text [T] by a module's own code through a paged cache, in chunks."""
    layers = attention.probe_layers(module)
    with torch.inference_mode():
        return guards.run_paged(partial(attention.forward, module), layers, texts)


def eager_model(folder: Path | str) -> Any:
    """The checkpoint in transformers' own code with eager attention, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def greedy_gap(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """How far `tokens`, in turn, are from the best continuation of `prompt` by full recomputation.

    0 when each is the argmax; else the largest distance to it, as a share of the largest logit.
    """
    ids, gap = list(prompt), 0.0
    for token in tokens:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        gap = max(gap, float((logits.max() - logits[token]) / logits.abs().max()))
        ids.append(token)
    return gap

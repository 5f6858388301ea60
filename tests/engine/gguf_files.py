"""GGUF files of tiny checkpoints, as llama.cpp's converter would write them, for tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import tiny
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType, quantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3",
    "starcoder2": "starcoder2", "gemma2": "gemma2", "gemma3_text": "gemma3", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "lfm2": "lfm2", "qwen3_5_text": "qwen35",
}  # fmt: skip
"""A checkpoint's model_type → what llama.cpp calls it."""
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
LFM2 = {
    "model.embedding_norm": "token_embd_norm", "operator_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm",
    "conv.in_proj": "shortconv.in_proj", "conv.conv": "shortconv.conv", "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
}  # fmt: skip
QWEN35 = {
    "post_attention_layernorm": "post_attention_norm", "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
}  # fmt: skip
GPT_OSS = {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"}
WHOLE = {
    "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias", "self_attn.sinks": "attn_sinks.weight",
}  # fmt: skip
Q4_1 = ".*(proj|c_fc|w[123]|in_proj_qkv|in_proj_z).weight"


def gguf_of(
    model_type: str,
    file: Path,
    kinds: dict[str, str] | None = None,
    extra: dict[str, Tensor] | None = None,
    folder: Path | None = None,
    **overrides: Any,
) -> Path:
    """The tiny checkpoint of `model_type`, or that in `folder`, as a GGUF file.

    `kinds`: block types by patterns of checkpoint names, the first that matches counts; F32 where none does.
    `extra`: tensors to add as they are.
    """
    folder = folder or tiny(model_type, **overrides)
    config = json.loads((folder / "config.json").read_text())
    architecture = {**ARCHITECTURES, "gpt_oss": "gpt-oss"}[model_type]
    writer = GGUFWriter(str(file), architecture)
    _write_config(writer, config, architecture)
    _write_tokenizer(writer, folder)
    for name, weight in _with_joined_experts(load_file(folder / "model.safetensors")).items():
        values = _as_llama_cpp(name, weight.float(), config, architecture).contiguous().numpy()
        kind = next((kind for pattern, kind in (kinds or {}).items() if re.fullmatch(pattern, name)), None)
        _add(writer, _gguf_name(name, architecture), values, kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _with_joined_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`experts.0.up_proj.weight`, `experts.1.up_proj.weight`, … as one tensor `experts.up_proj.weight`."""
    joined: dict[str, list[Tensor]] = {}
    for name in sorted(weights, key=lambda name: [int(x) if x.isdigit() else 0 for x in name.split(".")]):
        joined.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(weights[name])
    found = {name: torch.stack(each) if ".experts." in name else each[0] for name, each in joined.items()}
    for name in [name for name in found if re.search(r"experts\.(gate_up|down)_proj(_bias)?$", name)]:
        # gpt-oss's: [X, in, out], gates and ups in turn.
        stem, suffix = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
        weight = found.pop(name)[0]
        weight = weight if suffix == "bias" else weight.mT
        if stem.endswith("gate_up_proj"):
            found[f"{stem.replace('gate_up', 'gate')}.{suffix}"] = weight[:, ::2]
            found[f"{stem.replace('gate_up', 'up')}.{suffix}"] = weight[:, 1::2]
        else:
            found[f"{stem}.{suffix}"] = weight
    return found


def unpacked_model(file: Path, dtype: torch.dtype = torch.float32, expert_size: int = 32) -> Any:
    """The file in transformers' own code with eager attention, its blocks unpacked by transformers' reader."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if config.model_type.endswith("_moe"):  # the reader passes over these
        config.moe_intermediate_size = expert_size
        config.shared_expert_intermediate_size = expert_size
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="eager",
        dtype=dtype,
    )
    return model.eval()


def _add(writer: GGUFWriter, name: str, values: Any, kind: str | None) -> None:
    if kind is None:
        writer.add_tensor(name, values)
        return
    number = GGMLQuantizationType[kind]
    if kind.endswith("_K"):  # gguf's Python writes none of these: random blocks of a matrix's size
        writer.add_tensor(name, _random_blocks(values.shape, kind), raw_dtype=number)
    else:
        writer.add_tensor(name, quantize(values, number), raw_dtype=number)


def _random_blocks(shape: tuple[int, ...], kind: str) -> Any:
    elements, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(shape[0])
    blocks = generator.integers(0, 256, (*shape[:-1], -(-shape[-1] // elements), width), dtype=np.uint8)
    factors = generator.uniform(1e-4, 2e-4, blocks.shape[:-1]).astype(np.float16)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        blocks[..., at : at + 2] = factors[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _write_config(writer: GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    kv_heads = config.get("num_key_value_heads", heads)
    if architecture == "lfm2":
        kinds = config["layer_types"]
        writer.add_head_count_kv([kv_heads if kind == "full_attention" else 0 for kind in kinds])
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        writer.add_layer_norm_rms_eps(config["norm_eps"])
    else:
        writer.add_head_count_kv(kv_heads)
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(config["norm_epsilon"])
    elif architecture != "lfm2":
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    if architecture == "qwen35":
        _write_delta_net(writer, config)
    if architecture == "gpt-oss":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_rope_freq_base(
        rope["rope_theta"] if "rope_theta" in rope else rope["full_attention"]["rope_theta"]
    )
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1)))
    writer.add_key_length(size)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _write_delta_net(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    pairs = int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]) // 2
    writer.add_rope_dimension_sections([pairs - 2, 1, 1, 0])


def _write_tokenizer(writer: GGUFWriter, folder: Path) -> None:
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
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _in_turns(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """A delta net's weight with the first value head of each key head before the second of each."""
    keys, size = config["linear_num_key_heads"], config["linear_value_head_dim"]
    part = name.split("linear_attn.")[1].split(".")[0]
    if part == "A_log":
        weight = -weight.exp()
    if part == "norm":
        return weight
    if part == "out_proj":
        return weight.unflatten(1, (keys, -1, size)).transpose(1, 2).flatten(1)
    weight = weight.squeeze(1) if part == "conv1d" else weight
    before = 2 * keys * config["linear_key_head_dim"] if part in ("in_proj_qkv", "conv1d") else 0
    each = size if before or part == "in_proj_z" else 1
    turned = weight[before:].unflatten(0, (keys, -1, each)).transpose(0, 1).flatten(0, 2)
    return torch.cat([weight[:before], turned])


def _gguf_name(name: str, architecture: str) -> str:
    names = {
        **NAMES,
        **(GEMMA if architecture.startswith("gemma") else {}),
        **{"lfm2": LFM2, "qwen35": QWEN35, "gpt-oss": GPT_OSS}.get(architecture, {}),
    }
    stem, suffix = name.rsplit(".", 1)
    layer = re.match(r"model\.layers\.(\d+)\.", stem)
    if layer and name[layer.end() :] in WHOLE:
        return f"blk.{layer[1]}.{WHOLE[name[layer.end() :]]}"
    known = names[stem[layer.end() :] if layer else stem]
    return f"blk.{layer[1]}.{known}.{suffix}" if layer else f"{known}.{suffix}"


def _as_llama_cpp(name: str, weight: Tensor, config: dict[str, Any], architecture: str) -> Tensor:
    """llama.cpp turns neighbouring pairs of a head, transformers its halves; and its norms hold what they scale by."""
    if architecture.startswith(("gemma", "qwen35")) and "norm" in name and "linear_attn" not in name:
        return weight + 1
    if "linear_attn" in name:
        return _in_turns(name, weight, config)
    if name.endswith("shared_expert_gate.weight"):
        return weight.flatten()
    if name.endswith("conv.conv.weight"):
        return weight.squeeze(1)
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        half = weight.shape[0] // heads // 2
        return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)
    return weight

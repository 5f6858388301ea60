"""A config made small without losing its shape, and weights for it: for tiny checkpoints and for guards.

What makes a type special stays (biases, norms, windows, scalings, how layers differ); sizes are recognised by
the names that transformers' configs give them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import nn

WINDOW = 8
CONTEXT = 512
HEADS = 4


def size_table(hidden: int) -> dict[str, int]:
    """Small values for size fields, by name. Layers, vocabulary and KV heads depend on more than the name."""
    head = hidden // HEADS
    rows = [
        (hidden, "hidden_size d_model n_embd dim model_dim embed_dim emb_dim embedding_size lru_width"),
        (hidden, "word_embed_proj_dim feed_forward_size encoder_cross_output_size hidden_size_global"),
        (hidden, "adapter_in_dim adapter_out_dim adapter_input_size"),
        (
            2 * hidden,
            "intermediate_size ffn_dim n_inner d_inner d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size",
        ),
        (2 * hidden, "intermediate_size_mlp dense_intermediate_size shared_intermediate_size mamba_d_ssm"),
        (hidden // 2, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"),
        (hidden // 2, "moe_shared_expert_intermediate_size"),
        (
            HEADS,
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads",
        ),
        (2, "num_experts_per_tok top_k top_k_experts moe_topk moe_top_k moe_k num_experts_per_token"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "n_group num_expert_group"),
        (1, "topk_group n_shared_experts first_k_dense_replace"),
        (1, "num_nextn_predict_layers moe_num_shared_experts"),
        (8 * HEADS, "index_n_heads"),  # many, so that no two keys score alike
        (HEADS, "linear_num_value_heads linear_num_heads"),
        (HEADS // 2, "linear_num_key_heads kv_n_heads"),
        (head, "d_head dim_head index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
        (2 * HEADS, "mamba_n_heads mamba_num_heads n_mamba_heads"),  # of an inner size of 2 * hidden
        (head, "mamba_d_head mamba_head_dim mamba_headdim mamba_d_state ssm_state_size state_size"),
        (HEADS, "mamba_dt_rank time_step_rank adapter_rank"),
        (head, "head_dim d_kv global_head_dim kv_lora_rank q_lora_rank qk_head_dim query_pre_attn_scalar"),
        (head // 2, "qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim"),
        (hidden // 2, "hidden_size_per_layer_input"),
        (CONTEXT, "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len context_length"),
        (CONTEXT // 4, "original_max_position_embeddings"),
        (WINDOW, "sliding_window attention_window_size local_attention attention_chunk_size index_topk"),
        (WINDOW, "mamba_chunk_size"),
    ]
    return {name: value for value, line in rows for name in line.split()}


def fitting_fields(model_type: object, hidden: int) -> dict[str, Any]:
    """Fields that must fit each other in a way of the type's own, for two layers of `HEADS` heads."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    table: dict[str, dict[str, Any]] = {
        "bamba": {"attn_layer_indices": [1]},
        "blt": {"encoder_hash_byte_group_vocab": 256},
        "cohere_compass_text": {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}},
        "dbrx": {"attn_config": {"kv_n_heads": HEADS // 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
        "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": hidden // HEADS},
        "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
        "hrm_text": {"num_layers_per_stack": None},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "mamba2": {"num_heads": 2 * HEADS},
        "qwen4_exp_text": {
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": hidden // HEADS,
            "indexer_budget": WINDOW, "indexer_compress_ratio": WINDOW // 2,
        },
        "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
        "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
        "rwkv": {"attention_hidden_size": hidden},
        "xlstm": {"embedding_dim": hidden, "num_blocks": 2, "qk_dim_factor": 1.0},
        "xmod": {"default_language": "en_XX"},
        "zamba": {"attention_hidden_size": 2 * hidden, "attention_head_dim": 2 * hidden // HEADS},
        "zamba2": {
            "attention_hidden_size": 2 * hidden, "attention_head_dim": 2 * hidden // HEADS,
            "hybrid_layer_ids": [1],
        },
        "zaya": {"num_experts_per_tok": 1},
    }  # fmt: skip
    return table.get(str(model_type), {})


LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"]
KV_HEADS = ["num_key_value_heads", "num_kv_heads", "multi_query_group_num"]
VOCAB = ("vocab_size", "vocab_size_per_layer_input")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
AT_MOST = (
    "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "moe_num_shared_experts",
    "n_group", "num_expert_group",
)  # fmt: skip
MROPE_TYPES = {
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm4v_moe_text", "paddleocr_vl_text",
}  # fmt: skip
"""Types whose code assumes larger heads where a config doesn't say how angles are shared by time, height and width."""
OPTIONAL = ("hidden_size_per_layer_input",)
"""Sizes of a part that a model lacks where they are zero."""
BUFFERS = ("correction_bias", "expert_bias", "layer_scalar")
NEEDED = (*KV_HEADS, "head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""Sizes that a config may leave out (null) but a model can't do without."""


def shrink(fields: dict[str, Any], *, layers: int, hidden: int, vocab: int, grouped: bool) -> dict[str, Any]:
    """The fields of a config with their sizes made small, in sub-configs too.

    Lists that speak of each layer keep one entry for each combination that occurs, in turn; `layers` grows
    until all are there. KV heads are fewer than query heads when `grouped`, else as the config has them.
    """
    sizes = size_table(hidden) | dict.fromkeys(VOCAB, vocab)
    picked = pick_layers(fields, layers)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        count = type(value) is int or (value is None and name in NEEDED)
        if isinstance(value, dict) and name == "per_layer_config":
            small[name] = _shrink_exceptions(value, picked, sizes)
        elif isinstance(value, dict) and name.endswith("config"):
            small[name] = shrink(value, layers=layers, hidden=hidden, vocab=vocab, grouped=grouped)
        elif name in LAYERS and count:
            small[name] = len(picked)
        elif name in KV_HEADS and count:
            small[name] = _kv_heads(fields, value, grouped)
        elif name in SPECIAL and count:
            small[name] = min(value, 2)
        elif name in sizes and count and (value or name not in OPTIONAL):
            small[name] = min(value or 1, sizes[name]) if name in AT_MOST else sizes[name]
        elif isinstance(value, list) and len(value) == _depth(fields):
            small[name] = [sizes.get(name, value[i]) for i in picked]
        else:
            small[name] = value
    if "kv_lora_rank" in small and "qk_rope_head_dim" in small and small.get("head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    if small.get("rope_parameters"):
        if fields.get("model_type") in MROPE_TYPES:
            small["rope_parameters"].setdefault("mrope_section", [1, 1, 2])
        small["rope_parameters"] = _shrink_rope(small["rope_parameters"], hidden // HEADS)
    if small.get("attn_logit_softcapping"):  # small heads have small scores: a cap must still bend them
        small["attn_logit_softcapping"] = 1.0
    if small.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = len(picked) // 3
    return small | fitting_fields(fields.get("model_type"), hidden)


def pick_layers(fields: dict[str, Any], layers: int) -> list[int]:
    """Indices of layers to keep, at least `layers`: each combination of per-layer values once, in turn.

    Where later layers use the keys of earlier ones, each comes three times: the last of two counts.
    """
    depth = _depth(fields)
    lists = [x for x in fields.values() if isinstance(x, list) and len(x) == depth]
    if not lists or depth < 2:
        return [0] * layers
    if depth > layers:  # values that number the layers don't sort them
        lists = [x for x in lists if len(set(map(repr, x))) < depth]
    if not lists:
        return list(range(layers))
    kinds: dict[str, int] = {}
    for i, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(kind), i)
    distinct = list(kinds.values())
    count = max(layers, len(distinct) * (3 if fields.get("num_kv_shared_layers") else 1))
    return [distinct[i % len(distinct)] for i in range(count)]


def _depth(fields: dict[str, Any]) -> int:
    return next((fields[name] for name in LAYERS if type(fields.get(name)) is int), -1)


def _shrink_exceptions(
    exceptions: dict[Any, Any], picked: list[int], sizes: dict[str, int]
) -> dict[int, Any]:
    """What single layers have otherwise than the rest; a head size that is an exception stays one."""
    by_layer = {int(layer): fields for layer, fields in exceptions.items()}
    small: dict[int, Any] = {}
    for index, layer in enumerate(picked):
        if layer in by_layer:
            small[index] = {k: sizes.get(k, v) for k, v in by_layer[layer].items()}
            if "head_dim" in small[index]:
                small[index]["head_dim"] = 2 * sizes["head_dim"]
            if "kv_lora_rank" in small[index]:
                small[index].update({k: HEADS for k in KV_HEADS if k in small[index]})
    return small


def _kv_heads(fields: dict[str, Any], value: int | None, grouped: bool) -> int:
    """KV heads of the small config; multi-head latent attention gives every head keys of its own."""
    if "kv_lora_rank" in fields:
        return HEADS
    if value == 1:
        return 1
    fewer = value is not None and value < (fields.get("num_attention_heads") or fields.get("n_head") or value)
    return HEADS // 2 if grouped or fewer else HEADS


def _shrink_rope(parameters: dict[str, Any], head: int) -> dict[str, Any]:
    """RoPE parameters for the small context and heads; one set, or one for each type of layer."""
    small: dict[str, Any] = {
        k: _shrink_rope(v, head) if isinstance(v, dict) else v for k, v in parameters.items()
    }
    half = int(head * small.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(small.get(name), list):
            small[name] = (small[name] * half)[:half]
    if isinstance(small.get("mrope_section"), list):
        parts = [part * half // sum(small["mrope_section"]) for part in small["mrope_section"]]
        small["mrope_section"] = [*parts[:-1], half - sum(parts[:-1])]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = int(CONTEXT // max(1.0, small.get("factor") or 4.0))
    return small


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights anew: matrices that keep a signal's size, norms and biases jittered around their own.

    Among these are what some types keep as buffers: the biases by which routers choose, the scales of layers. The
    output embedding is larger, so that logits spread over several units. Each tensor's stream is named by its own
    name: a further layer changes none of the others.
    """
    with torch.no_grad():
        biases = ((n, b) for n, b in model.named_buffers() if n.endswith(BUFFERS))
        for name, weight in (*model.named_parameters(), *biases):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() < 2:
                weight.add_(0.1 * noise)
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                weight.copy_(noise * (2.5 / math.sqrt(weight.shape[-1])))
            else:
                weight.copy_(noise * (1.4 / math.sqrt(weight.shape[-1])))

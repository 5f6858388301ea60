"""What the tensors of a GGUF file are called in a transformers checkpoint, and what else its converter changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tokenmill.engine.load_error import LoadError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""Those of a mixture's, gate and up apart. `_join_experts` brings them together, as transformers holds them."""
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


LFM2 = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}


@dataclass(frozen=True, slots=True)
class Family:
    """How the tensors of an architecture differ from a checkpoint's."""

    names: Mapping[str, str]
    """What is called otherwise than in `NAMES`."""
    turned: bool = False
    """Rows of q and k lie in the order of a RoPE that turns neighbouring pairs, not halves of a head."""
    norm_offset: float = 0.0
    """What the converter added to norms' weights."""
    plain_norms: frozenset[str] = frozenset()
    """Norms that it added nothing to."""
    whole_names: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose names end otherwise in a checkpoint."""
    tiled_heads: bool = False
    """Value heads of a gated delta net lie in turns: the first of each key head, then the second of each."""
    turned_experts: bool = False
    """A checkpoint has experts as [X, in, out], gates and ups in turn."""
    looks_ahead: bool = False
    """Blocks may stand behind the model's own that would guess several tokens at once; they are left out."""


QWEN35 = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
GPT_OSS = {
    **EXPERTS,
    "ffn_gate_inp": "mlp.router",
    "post_attention_norm": "post_attention_layernorm",
}


QWEN35_FAMILY = Family(
    QWEN35,
    norm_offset=1.0,
    plain_norms=frozenset({"ssm_norm"}),
    whole_names={"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"},
    tiled_heads=True,
    looks_ahead=True,
)
FAMILIES = {
    "llama": Family({}, turned=True),
    "qwen2": Family({}),
    "qwen3": Family({}),
    "qwen2moe": Family(EXPERTS),
    "qwen3moe": Family(EXPERTS),
    "phi3": Family({"ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": Family({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gemma2": Family(SANDWICH, norm_offset=1.0),
    "gemma3": Family(SANDWICH, norm_offset=1.0),
    "lfm2": Family(LFM2),
    "gpt-oss": Family(GPT_OSS, whole_names={"attn_sinks.weight": "self_attn.sinks"}, turned_experts=True),
    "qwen35": QWEN35_FAMILY,
    "qwen35moe": replace(QWEN35_FAMILY, names=QWEN35 | EXPERTS),
}
"""By `general.architecture`. llama also is mistral."""


def checkpoint_name(name: str, family: Family) -> str:
    """A tensor's name in a transformers checkpoint; raises LoadError for one that has none."""
    parts = name.split(".")
    within = parts[0] == "blk"
    rest = ".".join(parts[2:]) if within else name
    if within and rest in family.whole_names:
        return f"model.layers.{parts[1]}.{family.whole_names[rest]}"
    stem, _, suffix = rest.rpartition(".")
    known = {**NAMES, **family.names}.get(stem)
    if known is None or suffix not in ("weight", "bias") or within == known.startswith(("model.", "lm_head")):
        raise LoadError(
            f"quantization gguf: the file holds {name:.60}, which isn't understood; leave quantization out"
        )
    return f"model.layers.{parts[1]}.{known}.{suffix}" if within else f"{known}.{suffix}"

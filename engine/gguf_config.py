"""Configs of GGUF files that transformers' own reader gets wrong or doesn't know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def configs_known() -> Iterator[None]:
    """Inside it transformers makes these configs of such files, and tokenizers by them, where its release can."""
    try:
        known: dict[str, Any] = import_module("transformers.integrations.gguf").GGUF_CONFIG_ARCHS
    except (ImportError, AttributeError):
        yield
        return
    added = {name: make for name, make in CONFIGS.items() if name not in known}
    known.update(added)
    try:
        yield
    finally:
        for name in added:
            del known[name]


def _gpt_oss(metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
    def field(name: str, *otherwise: Any) -> Any:
        return metadata.get(f"gpt-oss.{name}", *otherwise)

    ends = metadata.get("tokenizer.ggml.eos_token_id")
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "sliding_window": field("attention.sliding_window"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "intermediate_size": field("expert_feed_forward_length"),
        "num_local_experts": field("expert_count"),
        "num_experts_per_tok": field("expert_used_count"),
        "max_position_embeddings": field("context_length"),
        "rope_parameters": {
            "rope_theta": field("rope.freq_base"),
            "rope_type": field("rope.scaling.type", "default"),
            "factor": field("rope.scaling.factor", 1.0),
            "original_max_position_embeddings": field("rope.scaling.original_context_length"),
            "beta_fast": field("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": field("rope.scaling.yarn_beta_slow", 1.0),
            "truncate": False,
        },
        # The tokenizer's tokens come as their number.
        "vocab_size": metadata["tokenizer.ggml.tokens"],
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        # A file has one; the format of o200k's chats ends an answer by <|return|> or <|call|>.
        "eos_token_id": [200002, 200012] if ends == 200002 else ends,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


CONFIGS = {"gpt-oss": _gpt_oss}
"""By `general.architecture`: (metadata, names of tensors) → config.json."""

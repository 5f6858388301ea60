"""Tiny Gemma 4 checkpoints with the parts of each published size."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from checkpoints import session_folder

from tokenmill.engine.tiny import make_tiny

SLIDING, FULL = "sliding_attention", "full_attention"
KEYS_ARE_VALUES = {
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}},
    "final_logit_softcapping": 30.0,
}
FLAVOURS: dict[str, dict[str, Any]] = {
    # Layers 4 and 5 use the keys of 2 and 3, not of 0 and 1.
    "E2B": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, FULL] * 3,
        "per_layer_config": {str(i): {"head_dim": 32} for i in (1, 3, 5)},
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
    "31B": KEYS_ARE_VALUES,
    "26B-A4B": KEYS_ARE_VALUES
    | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
}


@cache
def gemma4(flavour: str, model_type: str = "gemma4_text") -> Path:
    """The folder of a tiny checkpoint that every test of the session shares."""
    return make_tiny(model_type, session_folder() / f"{model_type}-{flavour}", **FLAVOURS[flavour])

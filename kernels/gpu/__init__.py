"""The CUDA kernels, in Triton. Each function has the signature of its twin in `kernels/reference.py`
or `kernels/recurrent.py`.

Names are loaded at first use, so this package can be imported where Triton isn't installed; using one then
raises ImportError with one line.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_HOMES = {
    "rms_norm": "norms",
    "rms_norm_rows": "norms",
    "add_rms_norm": "norms",
    "norm_add": "norms",
    "RowNorm": "norms",
    "activation_mul": "activation",
    "act_mul": "activation",
    "store_kv": "kv_store",
    "rope_store": "kv_store",
    "copy_blocks": "kv_store",
    "paged_attention": "attention",
    "paged_attention_decode": "attention_decode",
    "paged_attention_prefill": "attention_prefill",
    "make_decode_plan": "attention_decode",
    "plan_decode": "attention_decode",
    "plan_prefill": "attention_prefill",
    "apply_logit_bias": "logits",
    "apply_penalties": "logits",
    "apply_bitmask": "logits",
    "adjust_logits": "logits",
    "Bias": "logits",
    "Penalties": "logits",
    "Mask": "logits",
    "filter_logits": "filters",
    "filter_thresholds": "filters",
    "sample": "sampling",
    "first_argmax": "sampling",
    "make_sampling_workspace": "sampling",
    "token_logprobs": "logprobs",
    "make_logprobs_workspace": "logprobs",
    "linear": "skinny_linear",
    "make_linear_workspace": "skinny_linear",
    "QuantizedWeight": "quantize",
    "quantize_fp8": "quantize",
    "quantize_int8": "quantize",
    "quantize_int4": "quantize",
    "hold": "quantize",
    "Fp8Rows": "fp8_rows",
    "quantize_rows": "fp8_rows",
    "fp8_linear": "fp8_matmul",
    "interleaved": "fp8_matmul",
    "overlapping_launches": "overlap",
    "supports_overlap": "overlap",
    "compile_ahead": "ahead",
    "compile_all": "warmup",
    "ModelShapes": "warmup",
    "check_toolchain": "jit",
    "route": "moe_routing",
    "mixture": "moe",
    "causal_conv": "recurrent",
    "recur": "recurrent",
    "gated_norm": "recurrent",
    "gate_mul": "recurrent",
    "copy_states": "recurrent",
}

__all__ = sorted(_HOMES)


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not available():
        raise ImportError("the GPU kernels need Triton: pip install 'tokenmill[gpu]'")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value

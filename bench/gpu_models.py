"""Models of well-known shapes with random weights, built on the device: no hub, no files.

The shapes are those of the checkpoints' config.json on the Hugging Face hub: Qwen/Qwen3-0.6B,
meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B. Weights are drawn so that a signal keeps its size from
layer to layer and logits spread over several units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tokenmill.engine.engine import Engine
    from tokenmill.engine.loader import LoadedModel

QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
LLAMA32_1B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA31_8B: dict[str, Any] = {
    **LLAMA32_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False, "rope_parameters": {**LLAMA32_1B["rope_parameters"], "factor": 8.0},
}  # fmt: skip
SHAPES = {"Qwen3-0.6B": QWEN3_06B, "Llama-3.2-1B": LLAMA32_1B, "Llama-3.1-8B": LLAMA31_8B}


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The same shape, small enough for the kernels' interpreter."""
    return fields | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 512,
    }  # fmt: skip


@dataclass(slots=True)
class Sizes:
    """How large everything is: true sizes, or those of a rehearsal."""

    dtype: str = "bfloat16"
    context: int = 16384
    batch: int = 256
    text: int = 512
    alone: tuple[int, int] = (128, 512)
    jobs: int = 256
    prefill: tuple[int, int] = (8192, 3)
    saturated: int = 1024
    peers: tuple[int, int, int] = (256, 128, 128)
    rounds: int = 20
    shapes: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(SHAPES))


def rehearsal() -> Sizes:
    """Sizes for the interpreter."""
    small = {name: shrunk(fields) for name, fields in list(SHAPES.items())[:1]}
    return Sizes("float32", 64, 2, 12, (6, 3), 2, (16, 1), 2, (2, 4, 2), 1, small)


def build_module(
    fields: dict[str, Any], device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0
) -> Any:
    """A transformers causal LM of these config fields; its weights depend on `seed`, device and dtype alone.

    On the meta device it has shapes and no weights.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tokenmill.engine.attention import register
    from tokenmill.engine.model_class import causal_lm_class

    register()
    config: Any = CONFIG_MAPPING[fields["model_type"]]
    model_class, config = causal_lm_class(config.from_dict(dict(fields)))
    build: Any = model_class._from_config
    with torch.device(device):
        module = build(config, attn_implementation=attention, dtype=dtype)
    if device.type == "meta":
        return module
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() < 2:
                weight.normal_(1.0, 0.1, generator=generator)
            else:
                size = 2.5 if "embed" in name or "lm_head" in name else 1.4
                weight.normal_(0.0, size / math.sqrt(weight.shape[-1]), generator=generator)
    module.requires_grad_(False)
    module.train(False)
    return module


def load_random(
    fields: dict[str, Any], device: torch.device, dtype: torch.dtype, max_context: int, seed: int = 0
) -> LoadedModel:
    """What `loader.load` would have made of such a checkpoint, without a tokenizer."""
    from tokenmill.engine import attention, guards
    from tokenmill.engine.loader import LoadedModel
    from tokenmill.engine.messages import TokenizerInfo
    from tokenmill.engine.model_size import size_of
    from tokenmill.engine.rope import pin_rope

    module = build_module(fields, device, dtype, attention.NAME, seed)
    config = module.config
    pin_rope(module, max_context)
    vars(config)["pad_token_id"] = None
    parameters = sum(x.numel() for x in module.parameters())
    return LoadedModel(
        module=module,
        tokenizer=TokenizerInfo(tokenizer_json="", vocab_size=config.vocab_size),
        device=device,
        dtype=dtype,
        max_context=max_context,
        eos_ids=(),
        logits_width=config.vocab_size,
        fingerprint="random",
        description=f"{config.model_type}, {parameters / 1e6:,.0f}M random parameters on {device}",
        model_type=config.model_type,
        parameters=parameters,
        size=size_of(module, config),
        verdict=guards.check(type(module), config),
    )


def make_engine(
    fields: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_context: int,
    max_batch: int,
    **settings: Any,
) -> Engine:
    """An engine on such a model, with all its decode steps captured; without a GPU, by a stand-in for graphs."""
    from tokenmill.engine.config import EngineConfig
    from tokenmill.engine.cuda_graph import record
    from tokenmill.engine.engine import Engine
    from tokenmill.engine.garbage import leave_alone

    config = EngineConfig(
        source="random", max_context=max_context, max_batch=max_batch, overlap=True, **settings
    )
    engine = Engine(config, model=load_random(fields, device, dtype, max_context))
    if device.type != "cuda" and engine.runner.can_capture:
        engine.runner.make_graphs(record)
        engine.warming = True
    while engine.warming:
        engine.warm_up_next()
    leave_alone()  # as a server's engine process does
    return engine

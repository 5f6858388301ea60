"""What a loaded model makes each step read: counted from its own tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenmill.bench.roofline import Footprint

if TYPE_CHECKING:
    from torch import Tensor

    from tokenmill.engine.engine import Engine


def footprint_of(engine: Engine) -> Footprint:
    """The footprint of the model that `engine` has loaded."""
    module: Any = engine.model.module
    aside = _input_embedding(module)
    dense = experts = 0.0
    dense_bytes = expert_bytes = 0.0
    for name, weight in module.named_parameters():
        if weight is aside or weight.dim() < 2:
            continue
        size = weight.numel()
        if ".experts." in name:
            experts, expert_bytes = experts + size, expert_bytes + size * weight.element_size()
        else:
            dense, dense_bytes = dense + size, dense_bytes + size * weight.element_size()
    cache = engine.runner.cache
    kv_bytes = sum(
        keys.nbytes / keys.shape[0] + values.nbytes / values.shape[0] for keys, values in cache.caches
    )
    return Footprint(
        weight_bytes=dense_bytes,
        weights=dense,
        kv_bytes_per_token=kv_bytes / cache.block_size,
        expert_bytes=expert_bytes,
        expert_weights=experts,
        expert_share=_expert_share(engine.model.hf_config) if experts else 1.0,
    )


def _input_embedding(module: Any) -> Tensor | None:
    """The input embedding's weight, unless it is the output's too (tied: then it is read whole)."""
    weight: Tensor = module.get_input_embeddings().weight
    head = module.get_output_embeddings()
    return None if head is not None and head.weight is weight else weight


def _expert_share(config: object) -> float:
    """Of a mixture's experts, the share that one token meets."""
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        total = getattr(config, name, None)
        if chosen and total:
            return float(chosen / total)
    return 1.0

"""What a loaded model makes each step read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmill.bench.roofline import Footprint

if TYPE_CHECKING:
    from tokenmill.engine.engine import Engine


def footprint_of(engine: Engine) -> Footprint:
    """The footprint of the model that `engine` has loaded."""
    size, kernels = engine.model.size, engine.runner.kernels
    return Footprint(
        weight_bytes=size.weight_bytes - kernels.saved_bytes,
        weights=size.weights,
        kv_bytes_per_token=engine.runner.forward.capacity.bytes_per_token,
        expert_bytes=size.expert_bytes - kernels.saved_expert_bytes,
        expert_weights=size.expert_weights,
        expert_share=size.expert_share,
    )

"""Reads off a transformers layer what only Gemma 4's have.

Some layers use the keys and values of an earlier one (E2B, E4B), or keys are the values, too (`attention_k_eq_v`).
A second embedding has columns for each layer, which it adds to what goes through it (E2B, E4B). Experts stand beside
the MLP (26B-A4B). What leaves a layer is scaled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenmill.engine import describe_experts as moe
from tokenmill.engine import describe_parts as parts
from tokenmill.engine.decoder_spec import Beside, Experts, LayerInput, LayerInputs, Linear, Norm
from tokenmill.engine.describe_parts import NotUnderstood
from tokenmill.kernels.reference import Routing

INPUT_NORM = "post_per_layer_input_norm"


def shared_layer(part: Any, config: Any, index: int) -> int | None:
    """The layer whose keys and values layer `index` uses: the last of its kind that has its own."""
    if not getattr(part, "is_kv_shared_layer", False):
        return None
    own, kinds = config.num_hidden_layers - config.num_kv_shared_layers, config.layer_types
    return max(i for i in range(own) if kinds[i] == kinds[index])


def projections(part: Any, shares: int | None) -> list[Linear]:
    """q, k and v; where keys are the values, too, their product stands for both."""
    names = ["q_proj"] if shares is not None else ["q_proj", "k_proj", "v_proj"]
    if getattr(part, "use_alternative_attention", False) and shares is None:
        names[2] = "k_proj"
    return [parts.linear(getattr(part, name, None)) for name in names]


def norms_values(part: Any) -> bool:
    """Whether value heads are normed: without a weight, with the eps of the queries."""
    norm = getattr(part, "v_norm", None)
    if norm is None:
        return False
    if hasattr(norm, "weight") or norm.eps != part.q_norm.eps:
        raise NotUnderstood("a value norm with a weight or an eps of its own")
    return True


def layer_input(layer: Any) -> LayerInput | None:
    """What `layer` does with its input."""
    if not hasattr(layer, INPUT_NORM):
        return None
    return LayerInput(
        parts.linear(layer.per_layer_input_gate),
        parts.activation(layer.act_fn),
        parts.linear(layer.per_layer_projection),
        _rms(getattr(layer, INPUT_NORM)),
    )


def layer_inputs(inner: Any) -> LayerInputs | None:
    """The inputs of all layers."""
    table = getattr(inner, "embed_tokens_per_layer", None)
    if table is None:
        return None
    # A factor before an RMS norm only changes what its eps weighs.
    norm = _rms(inner.per_layer_projection_norm)
    norm.eps /= inner.per_layer_model_projection_scale**2
    return LayerInputs(
        table.weight,
        float(table.embed_scale.to(table.weight.dtype)),
        parts.linear(inner.per_layer_model_projection),
        norm,
        float(inner.per_layer_input_scale),
    )


def beside(layer: Any, taken: list[Tensor]) -> Beside | None:
    """The experts beside the MLP of `layer`. A parameter that becomes another is noted in `taken`."""
    if not getattr(layer, "enable_moe_block", False):
        return None
    router, held = layer.router, layer.experts
    gate_up, down, transposed = moe.matrices(held)
    activation, interleaved = moe.gate(held, down.shape[1 if transposed else 2])
    routing = Routing(router.config.top_k_experts, gains=router.per_expert_scale)
    return Beside(
        Experts(
            parts.linear(router.proj),
            gate_up,
            down,
            routing,
            activation,
            transposed=transposed,
            interleaved=interleaved,
        ),
        router_in=_router_norm(router, taken),
        experts_in=_rms(layer.pre_feedforward_layernorm_2),
        mlp_out=_rms(layer.post_feedforward_layernorm_1),
        experts_out=_rms(layer.post_feedforward_layernorm_2),
    )


def out_scale(layer: nn.Module) -> float:
    """What leaves `layer` is multiplied by this."""
    scale = getattr(layer, "layer_scalar", None)
    return 1.0 if scale is None else float(scale)


def _rms(part: nn.Module) -> Norm:
    norm = parts.norm(part)
    if norm.mean:
        raise NotUnderstood("a layer's inner norm that subtracts the mean")
    return norm


def _router_norm(router: Any, taken: list[Tensor]) -> Norm:
    """A norm without a weight, then a scale [hidden] and a factor: one weight."""
    if hasattr(router.norm, "weight"):
        raise NotUnderstood("a router whose norm has a weight")
    scale: Tensor = router.scale
    taken.append(scale)
    weight = scale.detach().float() * router.scalar_root_size
    return Norm(weight.to(scale.dtype), router.norm.eps)

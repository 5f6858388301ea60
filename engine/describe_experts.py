"""Reads a mixture of experts off a transformers block: router, experts, what all tokens share.

How the router chooses and what a gate does to its up rows is told by known vectors, in float32 whatever the weights
are in: names differ, and so do the ways in which checkpoints store the same thing.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tokenmill.engine import describe_parts as parts
from tokenmill.engine.decoder_spec import MLP, Experts, Linear
from tokenmill.engine.describe_parts import NotUnderstood
from tokenmill.kernels import reference
from tokenmill.kernels.reference import Routing

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
KNOWN = {"gate", "router", "experts", "shared_expert_gate", *SHARED}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")
PROBES = 16


def experts(block: nn.Module, beside: nn.Module | None = None) -> Experts:
    """The mixture `block`; `beside` is an expert for every token that the layer adds to it."""
    strange = {name for name, _ in block.named_children()} - KNOWN
    if strange:
        raise NotUnderstood(f"{type(block).__name__} with {min(strange)}")
    router, held = parts.one_of(block, "gate", "router"), parts.one_of(block, "experts")
    logits = _router_linear(router)
    gate_up, down, transposed = matrices(held)
    activation, interleaved = gate(held, down.shape[1 if transposed else 2])
    shared_gate = getattr(block, "shared_expert_gate", None)
    return Experts(
        router=logits,
        gate_up=gate_up,
        down=down,
        routing=_routing(block, router, logits),
        activation=activation,
        gate_up_bias=getattr(held, "gate_up_proj_bias", None),
        down_bias=getattr(held, "down_proj_bias", None),
        shared=_shared(block, beside),
        shared_gate=None if shared_gate is None else parts.linear(shared_gate),
        transposed=transposed,
        interleaved=interleaved,
    )


def matrices(held: Any) -> tuple[Tensor, Tensor, bool]:
    """Gate with up, down, and whether each is stored as [X, in, out]."""
    gate_up, down = getattr(held, "gate_up_proj", None), getattr(held, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.ndim != 3:
        raise NotUnderstood(f"experts of a {type(held).__name__}")
    (_, rows, columns), (_, outputs, inner) = gate_up.shape, down.shape
    if (rows, columns) == (2 * inner, outputs):
        return gate_up, down, False
    if (rows, columns) == (inner, 2 * outputs):
        return gate_up, down, True
    raise NotUnderstood(f"experts of {list(gate_up.shape)} and {list(down.shape)}")


def gate(held: Any, inner: int) -> tuple[str, bool]:
    """The activation, and whether gate and up rows take turns."""
    low, up = torch.meshgrid(torch.linspace(-12, 12, 49), torch.linspace(-12, 12, 25), indexing="ij")
    low, up = low.reshape(-1, 1).expand(-1, inner), up.reshape(-1, 1).expand(-1, inner)
    pairs = torch.cat([low, up], dim=-1)
    turns = torch.stack([low, up], dim=-1).flatten(1)
    expected = {name: reference.activation_mul(pairs, name) for name in ACTIVATIONS}
    for probe, interleaved in ((pairs, False), (turns, True)):
        try:
            found = held._apply_gate(probe)
        except Exception as error:
            raise NotUnderstood(f"experts of a {type(held).__name__}") from error
        for name, wanted in expected.items():
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
                return name, interleaved
    raise NotUnderstood(f"the gate of {type(held).__name__}")


def _shared(block: Any, beside: nn.Module | None) -> MLP | None:
    """The expert that every token goes to, whose result is added as it is."""
    if getattr(block, "shared_expert_combination_strategy", "sum") != "sum":
        raise NotUnderstood(f"{type(block).__name__}, which doesn't add its shared experts")
    found = [part for name in SHARED if (part := getattr(block, name, None)) is not None]
    found += [] if beside is None else [beside]
    if len(found) > 1:
        raise NotUnderstood(f"{type(block).__name__} with two shared experts")
    return parts.mlp(found[0]) if found else None


def _router_linear(router: Any) -> Linear:
    """The product that brings a router's logits."""
    for part in (router, *(getattr(router, name, None) for name in ("wg", "gate"))):
        weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            return Linear(weight, bias if isinstance(bias, Tensor) else None)
    raise NotUnderstood(f"router {type(router).__name__}")


def _routing(block: Any, router: Any, logits: Linear) -> Routing:
    """How the experts are chosen and weighted, by what the router does to known vectors."""
    top, name = getattr(router, "top_k", None), f"router {type(router).__name__}"
    if not isinstance(top, int):
        raise NotUnderstood(name)
    correction, weight = _correction(block, router), logits.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, weight.shape[1], generator=generator).to(weight.device)
    wide = {k: v.float() for k, v in (*router.named_parameters(), *router.named_buffers())}
    takes_bias = len(inspect.signature(router.forward).parameters) > 1
    try:
        _, weights, ids = functional_call(router, wide, (probe, correction) if takes_bias else (probe,))
    except Exception as error:
        raise NotUnderstood(name) from error
    bias = None if logits.bias is None else logits.bias.float()
    values = nn.functional.linear(probe, weight.float(), bias)
    for routing in _candidates(router, top, correction):
        wanted_ids, wanted = reference.route(values, routing)
        if torch.allclose(_spread(ids, weights, values), _spread(wanted_ids, wanted, values), atol=1e-5):
            return routing
    raise NotUnderstood(name)


def _correction(block: Any, router: Any) -> Tensor | None:
    """What is added to the scores for the choice alone: [X]."""
    places = (router, getattr(router, "moe_statics", None), block)
    for name in ("e_score_correction_bias", "expert_bias"):
        for place in places:
            found = getattr(place, name, None)
            if isinstance(found, Tensor):
                return found.view(-1)
    return None


def _candidates(router: Any, top: int, correction: Tensor | None) -> list[Routing]:
    """What a router with these fields may do."""

    def field(*names: str) -> float:
        return next((value for name in names if (value := getattr(router, name, None))), 1)

    scale = float(field("routed_scaling_factor", "router_scaling_factor"))
    groups, kept = int(field("num_group", "n_group")), int(field("topk_group"))
    ways: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    return [
        Routing(top, renormalize, scoring, correction, groups, kept, scale)
        for scoring in ways
        for renormalize in (True, False)
    ]


def _spread(ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """The weight of every expert [T, X], zero for those that aren't chosen."""
    return torch.zeros_like(like).scatter_(1, ids.long(), weights.to(like.dtype))

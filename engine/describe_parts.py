"""Reads single parts of a transformers model: linears, norms, MLPs. What a part computes is told by known vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine.decoder_spec import MLP, Linear, Norm


class NotUnderstood(ValueError):
    """The model isn't a decoder of this kind; the message says what stood out."""


def mlp(part: nn.Module) -> MLP:
    """A gated or a plain MLP, by the names of its linears."""
    if hasattr(part, "w1") and hasattr(part, "w3"):  # LFM2's, which names no activation
        return MLP([linear(part.w1), linear(part.w3)], True, linear(getattr(part, "w2", None)), "silu")
    act = activation(one_of(part, "act_fn", "activation_fn", "act", "activation"))
    for joined, down in (("gate_up_proj", "down_proj"), ("input_linear", "output_linear")):
        if hasattr(part, joined):
            return MLP([linear(getattr(part, joined))], True, linear(getattr(part, down, None)), act)
    if hasattr(part, "gate_proj"):
        pair = [linear(part.gate_proj), linear(getattr(part, "up_proj", None))]
        return MLP(pair, True, linear(getattr(part, "down_proj", None)), act)
    up = linear(one_of(part, "c_fc", "fc1", "up_proj"))
    return MLP([up], False, linear(one_of(part, "c_proj", "fc2", "down_proj")), act)


def activation(function: Any) -> str:
    """Which of the kernels' activations this is, by its values."""
    x = torch.linspace(-4, 4, 65)
    candidates = {
        "silu": nn.functional.silu(x),
        "gelu": nn.functional.gelu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
    }
    try:
        value = function(x)
    except Exception as error:
        raise NotUnderstood(f"activation {type(function).__name__}") from error
    for name, expected in candidates.items():
        if torch.allclose(value, expected, atol=1e-6):
            return name
    raise NotUnderstood(f"activation {type(function).__name__}")


def norm(part: nn.Module) -> Norm:
    """Which norm this is, by what it does to a known vector."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    eps = next((getattr(part, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(part, n)), None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.ndim != 1:
        raise NotUnderstood(f"norm {type(part).__name__}")
    probe = torch.linspace(-1, 3, weight.shape[0], dtype=torch.float32, device=weight.device) ** 2
    found = part(probe.to(weight.dtype)[None])[0].float()
    for mean in (False, True):
        for offset in (0.0, 1.0):
            centred = probe - probe.mean() if mean else probe
            scaled = centred * torch.rsqrt(centred.square().mean() + eps) * (offset + weight.float())
            expected = scaled if bias is None else scaled + bias.float()
            if (found - expected).norm() <= 0.02 * expected.norm():
                return Norm(weight, eps, offset, mean, bias)
    raise NotUnderstood(f"norm {type(part).__name__}")


def optional_norm(part: nn.Module, *names: str) -> Norm | None:
    """The first of `names` that the part has."""
    found = next((getattr(part, name) for name in names if getattr(part, name, None) is not None), None)
    return None if found is None else norm(found)


def linear(part: Any) -> Linear:
    """A plain linear layer."""
    if type(part) is not nn.Linear:
        raise NotUnderstood(f"a {type(part).__name__} where a linear was looked for")
    return Linear(part.weight, part.bias)


def one_of(part: nn.Module, *names: str) -> Any:
    """What the part has under the first of `names` that it knows."""
    for name in names:
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    raise NotUnderstood(f"{type(part).__name__} without {names[0]}")

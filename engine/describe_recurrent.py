"""Reads the mixers of tokens off a transformers layer that carry a state instead of keys and values.

    linear_attn   gated delta rule                 Qwen3-Next, Qwen3.5, OLMo Hybrid
    mamba         state space of Mamba 2           Granite 4, Bamba
    conv          short gated convolution          LFM2

Each becomes the parts of one product, a convolution and, but for the last, a recurrence (`kernels/recurrent.py`).
Parameters that don't stay what they are (their rows change places, or a function of them is kept) are noted in
`taken`, so that `describe.py` knows that each has found its place.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine import describe_parts as parts
from tokenmill.engine.decoder_spec import Linear, Recurrent
from tokenmill.engine.describe_parts import NotUnderstood
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule


def recurrent(layer: nn.Module, taken: list[Tensor]) -> Recurrent | None:
    """The mixer of `layer` that carries a state, if it has one."""
    for name, read in READERS.items():
        part = getattr(layer, name, None)
        if part is not None:
            return read(part, taken)
    return None


def _delta_net(part: Any, taken: list[Tensor]) -> Recurrent:
    if hasattr(part, "in_proj_qkvz"):
        inputs, gates = _grouped_inputs(part, taken)
    elif hasattr(part, "in_proj_qkv"):
        inputs = [parts.linear(part.in_proj_qkv), parts.linear(part.in_proj_z)]
        gates = _joined([part.in_proj_b, part.in_proj_a], taken)
    else:
        inputs = [parts.linear(getattr(part, f"{name}_proj", None)) for name in "qkvg"]
        gates = _joined([part.b_proj, part.a_proj], taken)
    norm = parts.one_of(part, "norm", "o_norm")
    return Recurrent(
        inputs=inputs,
        conv=_conv(part.conv1d, part.activation, taken),
        out=parts.linear(parts.one_of(part, "out_proj", "o_proj")),
        gates=gates,
        rule=Rule(
            part.num_k_heads,
            part.num_v_heads,
            part.head_k_dim,
            part.head_v_dim,
            rate=-_kept(part.A_log, taken).exp(),
            step_bias=_kept(part.dt_bias, taken),
            delta=True,
            strength=2.0 if getattr(part, "allow_neg_eigval", False) else 1.0,
        ),
        norm=GatedNorm(norm.weight, norm.variance_epsilon, part.head_v_dim),
    )


def _grouped_inputs(part: Any, taken: list[Tensor]) -> tuple[list[Linear], Linear]:
    """Qwen3-Next's rows, a group for each head of keys: (q, k, values, z) in one product, (b, a) in another."""
    share = part.num_v_heads // part.num_k_heads
    keys, values = part.head_k_dim, part.head_v_dim * share
    mixed = parts.linear(part.in_proj_qkvz).weight
    gates = parts.linear(part.in_proj_ba).weight
    assert isinstance(mixed, Tensor)
    assert isinstance(gates, Tensor)
    taken += [mixed, gates]
    heads = mixed.view(part.num_k_heads, -1, mixed.shape[1])
    rows = torch.split(heads, [keys, keys, values, values], dim=1)
    pairs = torch.split(gates.view(part.num_k_heads, -1, gates.shape[1]), share, dim=1)
    return (
        [Linear(x.flatten(0, 1).contiguous()) for x in rows],
        Linear(torch.cat([x.flatten(0, 1) for x in pairs])),
    )


def _state_space(part: Any, taken: list[Tensor]) -> Recurrent:
    least, most = part.time_step_limit
    if most != inf:
        raise NotUnderstood("a state space whose steps have a limit")
    inner, groups, size = part.intermediate_size, part.n_groups, part.ssm_state_size
    sizes = [inner, inner, groups * size, groups * size, part.num_heads]
    whole = parts.linear(part.in_proj)
    assert isinstance(whole.weight, Tensor)
    taken += [whole.weight, *([] if whole.bias is None else [whole.bias])]
    weights = torch.split(whole.weight, sizes)
    biases = [None] * len(sizes) if whole.bias is None else torch.split(whole.bias, sizes)
    z, value, key, query, step = (Linear(w, b) for w, b in zip(weights, biases, strict=True))
    conv = _conv(part.conv1d, part.activation, taken)
    order = [slice(inner + groups * size, None), slice(inner, inner + groups * size), slice(0, inner)]
    conv.weight = torch.cat([conv.weight[x] for x in order])
    conv.bias = None if conv.bias is None else torch.cat([conv.bias[x] for x in order])
    return Recurrent(
        inputs=[query, key, value, z],
        conv=conv,
        out=parts.linear(part.out_proj),
        gates=step,
        rule=Rule(
            groups,
            part.num_heads,
            size,
            part.head_dim,
            rate=-_kept(part.A_log, taken).exp(),
            step_bias=_kept(part.dt_bias, taken),
            delta=False,
            skip=_kept(part.D, taken),
            least=float(least),
        ),
        norm=GatedNorm(
            part.norm.weight,
            part.norm.variance_epsilon,
            getattr(part.norm, "group_size", inner),
            gate_first=True,
        ),
    )


def _short_conv(part: Any, taken: list[Tensor]) -> Recurrent:
    conv = _conv(part.conv, None, taken)
    conv.gated = True
    return Recurrent(inputs=[parts.linear(part.in_proj)], conv=conv, out=parts.linear(part.out_proj))


READERS: dict[str, Callable[[Any, list[Tensor]], Recurrent]] = {
    "linear_attn": _delta_net,
    "mamba": _state_space,
    "conv": _short_conv,
}


def _conv(part: Any, activation: object, taken: list[Tensor]) -> Conv:
    if not isinstance(part, nn.Conv1d) or part.groups != part.in_channels:
        raise NotUnderstood(f"a {type(part).__name__} where a convolution was looked for")
    if activation not in (None, "silu"):
        raise NotUnderstood(f"a convolution with {activation}")
    taken += [part.weight, *([] if part.bias is None else [part.bias])]
    bias = None if part.bias is None else part.bias.detach().clone()
    return Conv(part.weight.detach().squeeze(1).clone(), bias, "silu" if activation else None)


def _joined(linears: list[Any], taken: list[Tensor]) -> Linear:
    """The rows of several small products one after the other."""
    weights = [parts.linear(each).weight for each in linears]
    if any(each.bias is not None for each in linears):
        raise NotUnderstood("gates with a bias")
    for weight in weights:
        assert isinstance(weight, Tensor)
        taken.append(weight)
    return Linear(torch.cat([weight for weight in weights if isinstance(weight, Tensor)]))


def _kept(parameter: Tensor, taken: list[Tensor]) -> Tensor:
    """A copy of a parameter in float32."""
    taken.append(parameter)
    return parameter.detach().float().clone()

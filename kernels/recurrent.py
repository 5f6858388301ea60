"""The kernels of layers that carry a state from token to token, in plain torch: the oracle of the fast ones.

Letters are those of `reference.py`; besides: L states a layer has room for, C channels, K taps of a convolution, G
heads of queries and keys, H heads of values, D size of queries and keys, E size of values.

A layer's states are tensors whose first dimension is L. `lines` [R] int64 names each sequence's own, `seq_lens` [R]
int32 and `query_start` [R + 1] int32 are those of attention. A sequence whose first token is in this step begins
with zeros, whatever its state holds. Tokens are taken one after the other, so that it makes no difference over how
many steps they are spread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.kernels import reference

Rows = tuple[Tensor, Tensor, Tensor]
"""`lines`, `seq_lens`, `query_start`."""
NORM_EPS = 1e-6
"""Of the queries' and keys' length, squared, under the delta rule."""


@dataclass(slots=True)
class Conv:
    """A causal convolution of each channel by itself: `weight` [C, K], `bias` [C], then the activation.

    `gated`: what is convolved are products of two inputs, and a third one is multiplied to the result (LFM2).
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    gated: bool = False


@dataclass(slots=True)
class Rule:
    """How a head's state S [D, E] takes in a token, and what its query reads from it.

    With step = softplus(gate + `step_bias`), at `least` so much, and decay = exp(`rate` * step), of each head; q, k, v
    the token's:

        S = decay * S + k v'^T        output = S^T q (+ `skip` * v)

    v' = step * v for a state space (Mamba 2). Under the delta `rule`, v' = b * (v - decay * S^T k): what S holds
    under the key already is replaced, by a share b = `strength` * sigmoid(a gate of its own); q and k are brought to
    length 1, and q is divided by the root of D.
    """

    key_heads: int
    heads: int
    key_size: int
    value_size: int
    rate: Tensor  # [H] float32, negative
    step_bias: Tensor  # [H] float32
    delta: bool
    strength: float = 1.0
    skip: Tensor | None = None  # [H] float32
    least: float = 0.0

    @property
    def width(self) -> int:
        """Elements of a token's [q | k | v]."""
        return 2 * self.key_heads * self.key_size + self.heads * self.value_size


@dataclass(slots=True)
class GatedNorm:
    """An RMS norm over each `size` elements, and a gate: norm(x) * weight * silu(gate).

    `gate_first`: norm(x * silu(gate)) * weight. `weight` [size] is every part's, or [W] of the whole row.
    """

    weight: Tensor
    eps: float
    size: int
    gate_first: bool = False


def causal_conv(x: Tensor, conv: Conv, state: Tensor, rows: Rows) -> Tensor:
    """The convolution of the first C columns of x [T, W]: [T, C] in x's type.

    `gated`: x is [a | b | c], C columns each, and the result is b * conv(a * c). `state` [L, K - 1, C] of x's type
    holds what was convolved last; it is rounded to that type before, so that it's the same from either place.
    """
    channels, taps = conv.weight.shape
    out = x.new_empty(x.shape[0], channels)
    weight = conv.weight.float()
    for line, first, last, fresh in _spans(rows):
        now = x[first:last, :channels].float()
        if conv.gated:
            now = (now * x[first:last, 2 * channels : 3 * channels].float()).to(x.dtype).float()
        past = torch.zeros_like(state[line]) if fresh else state[line]
        seen = torch.cat([past.float(), now])
        state[line] = seen[len(seen) - (taps - 1) :].to(state.dtype)
        bias = None if conv.bias is None else conv.bias.float()
        found = functional.conv1d(seen.T[None], weight[:, None], bias, groups=channels)[0].T
        if conv.activation is not None:
            found = reference.activate(found, conv.activation)
        if conv.gated:
            found = found * x[first:last, channels : 2 * channels].float()
        out[first:last] = found.to(x.dtype)
    return out


def recur(x: Tensor, gates: Tensor, rule: Rule, state: Tensor, rows: Rows) -> Tensor:
    """Outputs [T, H * E], in x's type, of tokens' [q | k | v] x [T, `rule.width`].

    `gates` float32 are [T, H] of steps, or [T, 2 * H] under the delta rule: [b | steps]. `state` [L, H, D, E] float32.
    """
    keys, heads, size = rule.key_heads * rule.key_size, rule.heads, rule.value_size
    out = x.new_empty(x.shape[0], heads * size)
    wide = x.float()
    query = wide[:, :keys].reshape(-1, rule.key_heads, rule.key_size)
    key = wide[:, keys : 2 * keys].reshape(-1, rule.key_heads, rule.key_size)
    value = wide[:, 2 * keys : rule.width].reshape(-1, heads, size)
    if rule.delta:
        query = _unit(query) * rule.key_size**-0.5
        key = _unit(key)
    query, key = (part.repeat_interleave(heads // rule.key_heads, dim=1) for part in (query, key))
    step = functional.softplus(gates[:, -heads:].float() + rule.step_bias).clamp(min=rule.least)
    decay = torch.exp(rule.rate * step)
    share = rule.strength * torch.sigmoid(gates[:, :heads].float()) if rule.delta else step
    for line, first, last, fresh in _spans(rows):
        held = torch.zeros_like(state[line]) if fresh else state[line].clone()
        for t in range(first, last):
            held = held * decay[t, :, None, None]
            taken = value[t]
            if rule.delta:
                taken = taken - torch.einsum("hde,hd->he", held, key[t])
            held = held + key[t][:, :, None] * (share[t][:, None] * taken)[:, None, :]
            read = torch.einsum("hde,hd->he", held, query[t])
            if rule.skip is not None:
                read = read + rule.skip[:, None] * value[t]
            out[t] = read.flatten().to(x.dtype)
        state[line] = held
    return out


def gated_norm(x: Tensor, gate: Tensor, norm: GatedNorm) -> Tensor:
    """The norm of x [T, W] under the last W columns of `gate` [T, ·], in x's type."""
    gate = functional.silu(gate[:, gate.shape[1] - x.shape[1] :].float())
    wide = x.float() * gate if norm.gate_first else x.float()
    parts = wide.view(len(wide), -1, norm.size)
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + norm.eps)
    weight = norm.weight.float().reshape(-1, norm.size)
    wide = (parts * weight).flatten(1)
    return (wide if norm.gate_first else wide * gate).to(x.dtype)


def gate_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x [T, W] * sigmoid(gate [T, W]), in x's type."""
    return (x.float() * torch.sigmoid(gate.float())).to(x.dtype)


def copy_states(state: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole states of one tensor; `source` and `target` are [n] int64 and disjoint."""
    state[target] = state[source]


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _spans(rows: Rows) -> Iterator[tuple[int, int, int, bool]]:
    """Of each sequence with tokens: its line, where these begin and end, and whether they are its first."""
    lines, lengths, borders = (part.tolist() for part in rows)
    for line, length, first, last in zip(lines, lengths, borders, borders[1:], strict=False):
        if first < last:
            yield line, first, last, length == last - first

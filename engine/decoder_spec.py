"""What a Llama-like decoder is made of: plain data, whose tensors are those of the model that it was read off.

    embed ─▶ [ norm ▶ qkv ▶ rope, store, attend ▶ out ▶ (norm) ▶ + ▶ norm ▶ gate, up ▶ act·mul ▶ down ▶ (norm) ▶ + ] × L
          ─▶ norm ▶ head

`describe.py` reads it off a module, `gguf.py` puts packed blocks into it, `shard.py` cuts it, `decoder.py` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenmill.engine import block_weight
from tokenmill.engine.block_weight import Blocks, Weight
from tokenmill.engine.group_weight import GroupExperts
from tokenmill.kernels.recurrent import Conv, GatedNorm, Rule
from tokenmill.kernels.reference import Routing


@dataclass(slots=True)
class Norm:
    """RMS norm times (offset + weight), or layer norm (`mean`: subtract it first) with an optional bias."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    mean: bool = False
    bias: Tensor | None = None


@dataclass(slots=True)
class Linear:
    """`weight` [out, in] and `bias` [out]. Several of them side by side make one matrix product."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(slots=True)
class Attention:
    """`qkv` holds the parts of one product in the order q, k, v. `rope` indexes `DecoderSpec.ropes`; None: no RoPE.

    What is attended to is multiplied by the sigmoid of `gate`'s outputs [heads * head_size], where that is given.
    `value_norm`: value heads get an RMS norm without a weight, with the eps of the others. A layer that `shares` the
    keys and values of another, earlier one (its index) has no k and v, and keeps nothing.
    """

    qkv: list[Linear]
    out: Linear
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None
    rope: int | None
    gate: Linear | None = None
    value_norm: bool = False
    shares: int | None = None


@dataclass(slots=True)
class Recurrent:
    """A mixer of tokens that carries a state, instead of attention.

    `inputs` are the parts of one product: what is convolved, then z. A recurrence by `rule` under the outputs of
    `gates`, and a norm gated by z, follow the convolution; a gated convolution (LFM2) is all that there is.
    """

    inputs: list[Linear]
    conv: Conv
    out: Linear
    gates: Linear | None = None
    rule: Rule | None = None
    norm: GatedNorm | None = None


@dataclass(slots=True)
class MLP:
    """`gate_up` holds gate and up, or up alone when nothing is gated; `activation` as kernels name it."""

    gate_up: list[Linear]
    gated: bool
    down: Linear
    activation: str


@dataclass(slots=True)
class Experts:
    """A mixture of gated experts, chosen by `routing` from `router`'s outputs [X].

    `gate_up` [X, 2 * I, in] holds each gate before its up rows, `down` is [X, out, I]; biases are [X, 2 * I] and
    [X, out]. `shared` is an expert for every token, times the sigmoid of `shared_gate` where that is given.

    Until it is `arranged`, a model may hold its matrices as [X, in, out] (`transposed`), and each gate row beside
    its up row (`interleaved`).
    """

    router: Linear
    gate_up: block_weight.Experts
    down: block_weight.Experts
    routing: Routing
    activation: str
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    shared: MLP | None = None
    shared_gate: Linear | None = None
    transposed: bool = False
    interleaved: bool = False

    @property
    def inner(self) -> int:
        """Hidden values of an expert."""
        return self.down.shape[1 if self.transposed and isinstance(self.down, Tensor) else 2]

    def arrange(self) -> None:
        """Bring the matrices into the order that kernels read. What was in another one is copied."""
        gate_up, down, bias = self.gate_up, self.down, self.gate_up_bias
        if not self.transposed and not self.interleaved:
            return
        if self.transposed:
            gate_up, down = (x.transpose(1, 2) if isinstance(x, Tensor) else x for x in (gate_up, down))
        if self.interleaved:
            rows = torch.arange(gate_up.shape[1]).view(-1, 2).T.flatten()
            if isinstance(gate_up, Tensor):
                gate_up = gate_up[:, rows]
            elif isinstance(gate_up, GroupExperts):
                gate_up = gate_up.with_rows(rows)
            bias = None if bias is None else bias[:, rows]
        self.gate_up, self.down = (x.contiguous() if isinstance(x, Tensor) else x for x in (gate_up, down))
        self.gate_up_bias = bias
        self.transposed = self.interleaved = False


@dataclass(slots=True)
class Beside:
    """Experts beside a layer's MLP (Gemma 4): router and experts each norm what the layer's norm reads, both results
    are normed (`mlp_out`, `experts_out`), and their sum is what the layer's MLP brings."""

    experts: Experts
    router_in: Norm
    experts_in: Norm
    mlp_out: Norm
    experts_out: Norm


@dataclass(slots=True)
class LayerInput:
    """What a layer adds last: norm(project(act(gate(x)) * its part of what `LayerInputs` bring))."""

    gate: Linear
    activation: str
    project: Linear
    norm: Norm


@dataclass(slots=True)
class LayerInputs:
    """An input [P] of each token to each layer, [T, L * P]: (norm(project(embedded)) + table[ids] * scale) * out_scale.

    `norm` is over the P of each layer.
    """

    table: Weight
    scale: float
    project: Linear
    norm: Norm
    out_scale: float


@dataclass(slots=True)
class Layer:
    """Norms stand before (`_in`) or after (`_out`) their block, or are missing. `parallel`: both read one norm.

    What leaves the layer is multiplied by `out_scale`, where its last step is a norm.
    """

    mixer: Attention | Recurrent
    mlp: MLP | Experts
    attention_in: Norm | None
    attention_out: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    parallel: bool
    beside: Beside | None = None
    own_input: LayerInput | None = None
    out_scale: float = 1.0


@dataclass(slots=True)
class Rope:
    """cos, sin [context, W] float32 for a head's first 2 * W dimensions."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(slots=True)
class DecoderSpec:
    """The whole model."""

    embedding: Weight
    embed_scale: float
    layers: list[Layer]
    norm: Norm
    head: Linear
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    ropes: list[Rope] = field(default_factory=list)
    inputs: LayerInputs | None = None


def replace_tensors(part: Any, change: Callable[[Tensor], Tensor | Blocks]) -> None:
    """Put `change(tensor)` in the place of every tensor of a description or a part of one."""
    for name in part.__dataclass_fields__:
        value = getattr(part, name)
        if isinstance(value, Tensor):
            setattr(part, name, change(value))
        elif isinstance(value, list) or hasattr(value, "__dataclass_fields__"):
            for each in value if isinstance(value, list) else [value]:
                replace_tensors(each, change)

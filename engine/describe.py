"""Reads off a loaded transformers model what its decoder is made of (`decoder_spec.py`).

A model is understood when every parameter of it has found its place; one with a parameter that hasn't runs by its
own code. Understanding is a guess at the arithmetic around the parameters: `guards.py` holds the result against the
model's own code before it is trusted.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine.attention import LayerSpec
from tokenmill.engine.decoder_spec import (
    MLP,
    Attention,
    DecoderSpec,
    Experts,
    Layer,
    Linear,
    Norm,
    Rope,
    replace_tensors,
)
from tokenmill.kernels.reference import Routing


class NotUnderstood(ValueError):
    """The model isn't a decoder of this kind; the message says what stood out."""


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
NORM_PLACES: dict[frozenset[str], tuple[str | None, str | None, str | None, str | None, bool]] = {
    # names of a layer's norms: (before attention, after it, before the MLP, after it, parallel)
    frozenset(SANDWICH[:2]): ("input_layernorm", None, "post_attention_layernorm", None, False),
    frozenset(SANDWICH): (*SANDWICH, False),
    frozenset(SANDWICH[1::2]): (None, SANDWICH[1], None, SANDWICH[3], False),
    frozenset(SANDWICH[:1]): ("input_layernorm", None, None, None, True),
    frozenset(
        {"input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"}
    ): (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
        False,
    ),
}


def describe(
    module: nn.Module, layers: list[LayerSpec], context: int, interleaved: bool = False
) -> DecoderSpec:
    """Read off `module`, a causal LM whose attention layers were probed; raises NotUnderstood.

    `context`: how many positions the rotary tables cover. `interleaved`: how its RoPE pairs dimensions, which
    its modules don't tell.
    """
    config: Any = module.config
    inner = getattr(module, "model", None)
    own: Any = module
    head = own.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if inner is None or not isinstance(head, nn.Linear) or not hasattr(inner, "layers"):
        raise NotUnderstood("no model.layers with an output embedding")
    embedding = own.get_input_embeddings()
    if len(layers) != len(inner.layers):
        raise NotUnderstood(f"{len(layers)} attention layers in {len(inner.layers)} decoder layers")
    ropes = _Ropes(inner, context, interleaved)
    spec = DecoderSpec(
        embedding=embedding.weight,
        embed_scale=_embed_scale(embedding, config),
        layers=[
            _layer(layer, cached, config, ropes, index)
            for index, (layer, cached) in enumerate(zip(inner.layers, layers, strict=True))
        ],
        norm=_norm(_one_of(inner, "norm", "final_layernorm")),
        head=Linear(head.weight, head.bias),
        residual_scale=float(getattr(config, "residual_multiplier", None) or 1.0),
        logit_scale=_logit_scale(config),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        ropes=ropes.tables,
    )
    _require_all_used(module, spec)
    # Vectors live on when the weights have been packed: as views they would keep the whole mapped file.
    replace_tensors(spec, lambda tensor: tensor.clone() if tensor.dim() == 1 else tensor)
    return spec


def _embed_scale(embedding: nn.Module, config: Any) -> float:
    own = getattr(embedding, "embed_scale", None)
    if isinstance(own, Tensor):
        weight: Tensor = embedding.weight  # type: ignore[assignment]
        return float(own.to(weight.dtype))
    return float(getattr(config, "embedding_multiplier", None) or 1.0)


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)


def _layer(layer: nn.Module, cached: LayerSpec, config: Any, ropes: _Ropes, index: int) -> Layer:
    norms = {name: part for name, part in layer.named_children() if name.endswith("norm")}
    places = NORM_PLACES.get(frozenset(norms))
    if places is None:
        raise NotUnderstood(f"a layer with the norms {', '.join(sorted(norms)) or 'none'}")
    attention = _attention(_one_of(layer, "self_attn", "attention"), cached, config, ropes, index)
    *names, parallel = places
    before, after, mlp_before, mlp_after = (
        None if name is None else _norm(norms[str(name)]) for name in names
    )
    mlp = _feed(_one_of(layer, "mlp", "feed_forward"))
    return Layer(attention, mlp, before, after, mlp_before, mlp_after, bool(parallel))


def _attention(part: nn.Module, cached: LayerSpec, config: Any, ropes: _Ropes, index: int) -> Attention:
    if cached.key_size != cached.value_size:
        raise NotUnderstood("keys and values of different sizes")
    if hasattr(part, "qkv_proj"):
        qkv = [_linear(part.qkv_proj)]
    else:
        qkv = [_linear(getattr(part, name, None)) for name in ("q_proj", "k_proj", "v_proj")]
    out = _linear(_one_of(part, "o_proj", "dense"))
    heads = out.weight.shape[1] // cached.key_size
    sinks = getattr(part, "sinks", None)
    q_norm, k_norm = (
        _optional_norm(part, "q_norm", "q_layernorm"),
        _optional_norm(part, "k_norm", "k_layernorm"),
    )
    if any(norm is not None and (norm.mean or norm.bias is not None) for norm in (q_norm, k_norm)):
        raise NotUnderstood("query and key norms that subtract the mean")
    return Attention(
        qkv=qkv,
        out=out,
        heads=heads,
        kv_heads=cached.kv_heads,
        head_size=cached.key_size,
        scale=float(getattr(part, "scaling", None) or cached.key_size**-0.5),
        window=cached.window,
        softcap=float(getattr(part, "attn_logit_softcapping", None) or 0.0),
        sinks=sinks if isinstance(sinks, Tensor) else None,
        q_norm=q_norm,
        k_norm=k_norm,
        rope=ropes.of(part, config, index),
    )


def _feed(part: nn.Module) -> MLP | Experts:
    return _experts(part) if hasattr(part, "experts") else _mlp(part)


def _experts(part: nn.Module) -> Experts:
    """A sparse block of a router named gate, experts in two tensors, and perhaps a shared expert."""
    known = {"gate", "experts", "shared_expert", "shared_expert_gate"}
    strange = {name for name, _ in part.named_children()} - known
    if strange:
        raise NotUnderstood(f"{type(part).__name__} with {min(strange)}")
    router, experts = _one_of(part, "gate"), _one_of(part, "experts")
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.ndim != 3:
        raise NotUnderstood(f"experts of a {type(experts).__name__}")
    if gate_up.shape[1] != 2 * down.shape[2] or gate_up.shape[2] != down.shape[1]:
        raise NotUnderstood(f"experts of {list(gate_up.shape)} and {list(down.shape)}")
    weight, top = getattr(router, "weight", None), getattr(router, "top_k", None)
    if not isinstance(weight, Tensor) or not isinstance(top, int) or len(list(router.parameters())) != 1:
        raise NotUnderstood(f"router {type(router).__name__}")
    shared, gate = getattr(part, "shared_expert", None), getattr(part, "shared_expert_gate", None)
    return Experts(
        router=Linear(weight),
        gate_up=gate_up,
        down=down,
        routing=Routing(top, _renormalizes(router, weight, top)),
        activation=_activation(_one_of(experts, "act_fn")),
        shared=None if shared is None else _mlp(shared),
        shared_gate=None if gate is None else _linear(gate),
    )


def _renormalizes(router: Any, weight: Tensor, top: int) -> bool:
    """Whether the chosen experts' weights are made to sum to one, by what the router does to known vectors."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        _, found, chosen = router(probe)
    except Exception as error:
        raise NotUnderstood(f"router {type(router).__name__}") from error
    scores = nn.functional.linear(probe, weight).float().softmax(-1).gather(-1, chosen)
    for renormalize in (True, False):
        expected = scores / scores.sum(-1, keepdim=True) if renormalize else scores
        if found.shape == expected.shape and (found.float() - expected).norm() <= 0.02 * expected.norm():
            return renormalize
    raise NotUnderstood(f"router {type(router).__name__}")


def _mlp(part: nn.Module) -> MLP:
    activation = _activation(_one_of(part, "act_fn", "activation_fn", "act", "activation"))
    if hasattr(part, "gate_up_proj"):
        return MLP([_linear(part.gate_up_proj)], True, _linear(getattr(part, "down_proj", None)), activation)
    if hasattr(part, "gate_proj"):
        pair = [_linear(part.gate_proj), _linear(getattr(part, "up_proj", None))]
        return MLP(pair, True, _linear(getattr(part, "down_proj", None)), activation)
    up = _linear(_one_of(part, "c_fc", "fc1", "up_proj"))
    return MLP([up], False, _linear(_one_of(part, "c_proj", "fc2", "down_proj")), activation)


def _activation(function: Any) -> str:
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


def _norm(part: nn.Module) -> Norm:
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


def _optional_norm(part: nn.Module, *names: str) -> Norm | None:
    found = next((getattr(part, name) for name in names if getattr(part, name, None) is not None), None)
    return None if found is None else _norm(found)


def _linear(part: Any) -> Linear:
    if type(part) is not nn.Linear:
        raise NotUnderstood(f"a {type(part).__name__} where a linear was looked for")
    return Linear(part.weight, part.bias)


def _one_of(part: nn.Module, *names: str) -> Any:
    for name in names:
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    raise NotUnderstood(f"{type(part).__name__} without {names[0]}")


class _Ropes:
    """The rotary tables of a model, one for each kind of layer that has its own."""

    def __init__(self, inner: nn.Module, context: int, interleaved: bool) -> None:
        self._module = getattr(inner, "rotary_emb", None)
        self._context = context
        self._interleaved = interleaved
        self._index: dict[str | None, int] = {}
        self.tables: list[Rope] = []

    def of(self, part: nn.Module, config: Any, index: int) -> int | None:
        """Which table layer `index` turns its heads by."""
        if self._module is None or getattr(part, "use_rope", 1) in (0, False):
            return None
        kind = None
        if "layer_type" in inspect.signature(self._module.forward).parameters:
            kind = config.layer_types[index]
        if kind not in self._index:
            self._index[kind] = len(self.tables)
            self.tables.append(self._table(kind))
        return self._index[kind]

    def _table(self, kind: str | None) -> Rope:
        assert self._module is not None
        device = next(self._module.buffers()).device
        positions = torch.arange(self._context, device=device)[None]
        like = torch.zeros(1, dtype=torch.float32, device=device)
        cos, sin = self._module(like, positions) if kind is None else self._module(like, positions, kind)
        step = 2 if torch.equal(cos[0, :, 0:2].amin(-1), cos[0, :, 0:2].amax(-1)) else 1
        half = cos.shape[-1] // 2
        pick = slice(0, None, 2) if step == 2 else slice(0, half)
        return Rope(cos[0, :, pick].contiguous(), sin[0, :, pick].contiguous(), self._interleaved)


def _require_all_used(module: nn.Module, spec: DecoderSpec) -> None:
    used: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        used.add(id(tensor))
        return tensor

    replace_tensors(spec, note)
    for name, parameter in module.named_parameters():
        if id(parameter) not in used:
            raise NotUnderstood(f"the parameter {name}")

"""Reads off a loaded transformers model what its decoder is made of (`decoder_spec.py`).

A model is understood when every parameter of it has found its place; one with a parameter that hasn't runs by its
own code. Understanding is a guess at the arithmetic around the parameters: `guards.py` holds the result against the
model's own code before it is trusted.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.engine import describe_gemma as gemma
from tokenmill.engine import describe_parts as parts
from tokenmill.engine.attention import Kept, LayerSpec, StateSpec
from tokenmill.engine.decoder_spec import (
    MLP,
    Attention,
    DecoderSpec,
    Experts,
    Layer,
    Linear,
    Recurrent,
    Rope,
    replace_tensors,
)
from tokenmill.engine.describe_experts import experts
from tokenmill.engine.describe_parts import NotUnderstood
from tokenmill.engine.describe_recurrent import recurrent
from tokenmill.engine.model_size import text_part

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
    frozenset({"operator_norm", "ffn_norm"}): ("operator_norm", None, "ffn_norm", None, False),
    frozenset({"input_layernorm", "pre_ff_layernorm"}): (
        "input_layernorm",
        None,
        "pre_ff_layernorm",
        None,
        False,
    ),
    frozenset({"attention_layernorm", "feedforward_layernorm"}): (
        "attention_layernorm",
        None,
        "feedforward_layernorm",
        None,
        False,
    ),
}


def describe(
    module: nn.Module, layers: list[LayerSpec], context: int, interleaved: bool = False
) -> DecoderSpec:
    """Read off `module`, a causal LM whose attention layers were probed; raises NotUnderstood.

    `context`: how many positions the rotary tables cover. `interleaved`: how its RoPE pairs dimensions, which
    its modules don't tell. Of a module that sees or hears, too, only what completes text is read.
    """
    own: Any = module
    config: Any = own.config.get_text_config(decoder=True)
    inner = text_part(module)
    head = own.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if inner is None or not isinstance(head, nn.Linear) or not hasattr(inner, "layers"):
        raise NotUnderstood("no model.layers with an output embedding")
    embedding = own.get_input_embeddings()
    ropes = _Ropes(inner, context, interleaved)
    attended = iter(layers)
    taken: list[Tensor] = []
    spec = DecoderSpec(
        embedding=embedding.weight,
        embed_scale=_embed_scale(embedding, config),
        layers=[
            _layer(
                layer,
                recurrent(layer, taken) or _attention(layer, attended, config, ropes, index, taken),
                taken,
            )
            for index, layer in enumerate(inner.layers)
        ],
        norm=parts.norm(parts.one_of(inner, "norm", "final_layernorm", "embedding_norm")),
        head=Linear(head.weight, head.bias),
        residual_scale=float(getattr(config, "residual_multiplier", None) or 1.0),
        logit_scale=_logit_scale(config),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        ropes=ropes.tables,
        inputs=gemma.layer_inputs(inner),
    )
    if next(attended, None) is not None:
        raise NotUnderstood(f"more than {len(inner.layers)} attention layers in as many decoder layers")
    _require_all_used(inner, spec, taken)
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


def kept_by(spec: DecoderSpec) -> list[Kept]:
    """What each layer keeps of a sequence."""
    return [_kept(layer.mixer) for layer in spec.layers]


def _kept(mixer: Attention | Recurrent) -> Kept:
    if isinstance(mixer, Attention):
        kv_heads = mixer.kv_heads if mixer.shares is None else 0
        return LayerSpec(kv_heads, mixer.head_size, mixer.head_size, mixer.window)
    channels, taps = mixer.conv.weight.shape
    rule = mixer.rule
    return StateSpec(
        (taps - 1, channels), None if rule is None else (rule.heads, rule.key_size, rule.value_size)
    )


def _layer(layer: nn.Module, mixer: Attention | Recurrent, taken: list[Tensor]) -> Layer:
    norms = {n: part for n, part in layer.named_children() if n.endswith("norm") and n != gemma.INPUT_NORM}
    places = NORM_PLACES.get(frozenset(norms))
    if places is None:
        raise NotUnderstood(f"a layer with the norms {', '.join(sorted(norms)) or 'none'}")
    *names, parallel = places
    before, after, mlp_before, mlp_after = (
        None if name is None else parts.norm(norms[str(name)]) for name in names
    )
    feed = _feed(layer, parts.one_of(layer, "mlp", "feed_forward", "block_sparse_moe", "shared_mlp"))
    return Layer(
        *(mixer, feed, before, after, mlp_before, mlp_after, bool(parallel)),
        beside=gemma.beside(layer, taken),
        own_input=gemma.layer_input(layer),
        out_scale=gemma.out_scale(layer),
    )


def _attention(
    layer: nn.Module,
    attended: Iterator[LayerSpec],
    config: Any,
    ropes: _Ropes,
    index: int,
    taken: list[Tensor],
) -> Attention:
    """The attention of layer `index`, which keeps what the next of `attended` says."""
    part, cached = parts.one_of(layer, "self_attn", "attention"), next(attended, None)
    if cached is None:
        raise NotUnderstood(f"a {type(part).__name__} that doesn't attend")
    if cached.key_size != cached.value_size:
        raise NotUnderstood("keys and values of different sizes")
    shares = gemma.shared_layer(part, config, index)
    if hasattr(part, "qkv_proj"):
        qkv = [parts.linear(part.qkv_proj)]
    else:
        qkv = gemma.projections(part, shares)
    out = parts.linear(parts.one_of(part, "o_proj", "dense", "out_proj"))
    heads = out.weight.shape[1] // cached.key_size
    gate = None
    if len(qkv) > 1 and qkv[0].weight.shape[0] == 2 * heads * cached.key_size:
        qkv[0], gate = _apart(qkv[0], heads, taken)
    sinks = getattr(part, "sinks", None)
    q_norm, k_norm = (
        parts.optional_norm(part, "q_norm", "q_layernorm"),
        parts.optional_norm(part, "k_norm", "k_layernorm"),
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
        gate=gate,
        value_norm=gemma.norms_values(part),
        shares=shares,
    )


def _apart(joined: Linear, heads: int, taken: list[Tensor]) -> tuple[Linear, Linear]:
    """Each head's queries and the gates behind them, as two products."""
    assert isinstance(joined.weight, Tensor)
    taken.append(joined.weight)
    biases: tuple[Tensor | None, ...] = (None, None)
    if joined.bias is not None:
        taken.append(joined.bias)
        biases = tuple(x.flatten() for x in joined.bias.view(heads, 2, -1).unbind(1))
    weights = joined.weight.view(heads, 2, -1, joined.weight.shape[1]).unbind(1)
    query, gate = (
        Linear(x.flatten(0, 1).contiguous(), bias) for x, bias in zip(weights, biases, strict=True)
    )
    return query, gate


def _feed(layer: nn.Module, part: nn.Module) -> MLP | Experts:
    """`part`, with the expert that stands beside it in the layer."""
    if hasattr(part, "experts"):
        return experts(part, getattr(layer, "shared_mlp", None))
    return parts.mlp(part)


class _Ropes:
    """The rotary tables of a model, one for each kind of layer that has its own."""

    def __init__(self, inner: nn.Module, context: int, interleaved: bool) -> None:
        self._module = getattr(inner, "rotary_emb", None) or getattr(inner, "pos_emb", None)
        self._context = context
        self._interleaved = interleaved
        self._index: dict[str | None, int] = {}
        self.tables: list[Rope] = []

    def of(self, part: nn.Module, config: Any, index: int) -> int | None:
        """Which table layer `index` turns its heads by."""
        if self._module is None or getattr(part, "use_rope", 1) in (0, False):
            return None
        if hasattr(part, "sliding_window_pattern") and part.sliding_window and not part.is_sliding:
            return None  # Exaone's layers that see everything
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
        pick = _angles(cos[0])
        return Rope(cos[0, :, pick].contiguous(), sin[0, :, pick].contiguous(), self._interleaved)


def _angles(table: Tensor) -> slice:
    """Which columns of a table [context, W] hold each angle once: all, the first half, or every other one."""
    half = table.shape[-1] // 2
    if torch.equal(table[:, :half], table[:, half:]):
        return slice(0, half)
    if torch.equal(table[:, 0::2], table[:, 1::2]):
        return slice(0, None, 2)
    return slice(None)


def _require_all_used(inner: nn.Module, spec: DecoderSpec, taken: list[Tensor]) -> None:
    used = {_identity(tensor) for tensor in taken}

    def note(tensor: Tensor) -> Tensor:
        used.add(_identity(tensor))
        return tensor

    replace_tensors(spec, note)
    for name, parameter in inner.named_parameters():
        if _identity(parameter) not in used:
            raise NotUnderstood(f"the parameter {name}")


def _identity(tensor: Tensor) -> int:
    """The same for a parameter and a view of all of it; a tensor without memory is only itself."""
    return tensor.data_ptr() or id(tensor)

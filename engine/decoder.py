"""The fused decoder: a model that `describe.py` understands, run by a handful of kernels a layer.

    norm ▶ qkv product ▶ RoPE + KV store ▶ paged attention ▶ out product (+ residual)
           or: product ▶ convolution ▶ recurrence ▶ gated norm ▶ out product
    norm ▶ gate and up product (activation·mul) ▶ down product (+ residual)      or a mixture of such experts

Every device runs this file; what differs is the kernels. The weights are handed to the kernels' own packing one
product at a time, and the module's copy is dropped at once, so that they are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tokenmill.engine import decoder_spec as spec
from tokenmill.engine.attention import AttentionMetadata
from tokenmill.engine.kernel_set import (
    Convolve,
    GatedNormalize,
    Mixture,
    NormAdd,
    Normalize,
    Product,
    Recur,
    ReferenceKernels,
    Router,
)
from tokenmill.engine.layer_inputs import LayerInput, LayerInputs
from tokenmill.kernels.reference import Routing

NOTHING = torch.empty(0)
Sum = Callable[[Tensor, Tensor | None], Tensor]
"""x [T, in], residual [T, out] or None → [T, out]: a product, or what a mixture's experts give together."""


class Spread(Protocol):
    """How results come together where each of several ranks holds a part of every matrix (parallel_forward.py)."""

    def summed(self, partial_sum: Sum) -> Sum:
        """All ranks' sums added up, on every rank; the residual is added once."""

    def joined(self, head: Product) -> Product:
        """All ranks' logits side by side, on rank 0."""


@dataclass(slots=True)
class _Block:
    """One layer, bound to its kernels."""

    layer: spec.Layer
    attention_in: Normalize
    attention_out: NormAdd | None
    mlp_in: Normalize
    mlp_out: NormAdd | None
    mixer: _Attend | _Carry
    out: Sum
    feed: _Dense | _Sparse
    beside: _Beside | None
    own_input: LayerInput | None


@dataclass(slots=True)
class _Attend:
    """Attention, and what it is gated by."""

    attention: spec.Attention
    qkv: Product
    gate: Product | None


@dataclass(slots=True)
class _Carry:
    """A mixer that carries a state: a convolution, and where there are `gates` a recurrence after it."""

    inputs: Product
    convolve: Convolve
    gates: Router | None
    recur: Recur | None
    normalize: GatedNormalize | None


@dataclass(slots=True)
class _Dense:
    """A gated or plain MLP; `activation` is what remains to be applied between its products."""

    up: Product
    down: Sum
    activation: str | None


@dataclass(slots=True)
class _Sparse:
    """A mixture of experts, with the expert that all tokens share."""

    router: Router
    mix: Mixture
    routing: Routing
    shared: _Dense | None
    shared_gate: Product | None


@dataclass(slots=True)
class _Beside:
    """A mixture of experts beside the MLP, with the norms around both."""

    sparse: _Sparse
    router_in: Normalize
    experts_in: Normalize
    mlp_out: Normalize
    experts_out: NormAdd


class Decoder:
    """Logits of a step's tokens. Takes the weights out of `model` as it goes.

    With `spread`, `model` is one rank's part (shard.py), and the logits are whole on rank 0 only.
    """

    def __init__(
        self, model: spec.DecoderSpec, kernels: ReferenceKernels, spread: Spread | None = None
    ) -> None:
        self._kernels = kernels
        self._spec = model
        self._spread = spread
        tied = model.head.weight is model.embedding
        head = kernels.make_head(model.head.weight, model.head.bias)
        self._embed = kernels.make_embedding(model.embedding, head if tied else None)
        _drop(model.head, model)
        self._norm = self._normalize(model.norm, [head])
        self._head = head if spread is None else spread.joined(head)
        self._inputs = None if model.inputs is None else LayerInputs(model.inputs, kernels)
        self._blocks = [self._block(layer, index) for index, layer in enumerate(model.layers)]
        self._stored = _layers_until_all_is_stored(model.layers)

    def _block(self, layer: spec.Layer, index: int) -> _Block:
        make, source = self._kernels.make_linear, layer.mixer
        mixer: _Attend | _Carry
        if isinstance(source, spec.Attention):
            mixer = self._attending(source)
            readers = [mixer.qkv, *([] if mixer.gate is None else [mixer.gate])]
        else:
            mixer = self._carrying(source)
            readers = [mixer.inputs] if mixer.gates is None else []
        feed: _Dense | _Sparse
        if isinstance(layer.mlp, spec.MLP):
            feed = self._dense(layer.mlp)
            feed.down = self._summed(feed.down)
        else:
            feed = self._sparse(layer.mlp)
        # A mixture, its router and a recurrence's gates read rows as they are.
        up = [feed.up] if isinstance(feed, _Dense) else []
        if layer.parallel:
            readers = [*readers, *up] if up and readers else []
        own, scale = layer.own_input, layer.out_scale
        block = _Block(
            layer,
            attention_in=self._normalize(layer.attention_in, readers),
            attention_out=self._norm_add(layer.attention_out),
            mlp_in=self._normalize(layer.mlp_in, up),
            mlp_out=self._norm_add(layer.mlp_out, scale if own is None else 1.0),
            mixer=mixer,
            out=self._summed(make([source.out.weight], [source.out.bias], None)),
            feed=feed,
            beside=None if layer.beside is None else self._mixture_beside(layer.beside),
            own_input=None if own is None else LayerInput(own, index, scale, self._kernels),
        )
        _drop(source.out)
        return block

    def _attending(self, attention: spec.Attention) -> _Attend:
        make, gate = self._kernels.make_linear, attention.gate
        attend = _Attend(
            attention,
            make([x.weight for x in attention.qkv], [x.bias for x in attention.qkv], None),
            None if gate is None else make([gate.weight], [gate.bias], None),
        )
        _drop(*attention.qkv, *([] if gate is None else [gate]))
        return attend

    def _carrying(self, mixer: spec.Recurrent) -> _Carry:
        kernels, gates = self._kernels, mixer.gates
        carry = _Carry(
            kernels.make_linear([x.weight for x in mixer.inputs], [x.bias for x in mixer.inputs], None),
            kernels.make_conv(mixer.conv),
            None if gates is None else kernels.make_router(gates.weight, gates.bias),
            None if mixer.rule is None else kernels.make_recurrence(mixer.rule),
            None if mixer.norm is None else kernels.make_gated_norm(mixer.norm),
        )
        _drop(*mixer.inputs, *([] if gates is None else [gates]))
        return carry

    def _summed(self, product: Sum) -> Sum:
        return product if self._spread is None else self._spread.summed(product)

    def _dense(self, mlp: spec.MLP) -> _Dense:
        make = self._kernels.make_linear
        gate = mlp.activation if mlp.gated else None
        dense = _Dense(
            up=make([x.weight for x in mlp.gate_up], [x.bias for x in mlp.gate_up], gate),
            down=make([mlp.down.weight], [mlp.down.bias], None),
            activation=None if mlp.gated else mlp.activation,
        )
        _drop(*mlp.gate_up, mlp.down)
        return dense

    def _sparse(self, experts: spec.Experts) -> _Sparse:
        make, gate = self._kernels.make_exact, experts.shared_gate
        experts.arrange()
        sparse = _Sparse(
            router=self._kernels.make_router(experts.router.weight, experts.router.bias),
            mix=self._kernels.make_mixture(
                experts.gate_up,
                experts.down,
                experts.activation,
                gate_up_bias=experts.gate_up_bias,
                down_bias=experts.down_bias,
            ),
            routing=experts.routing,
            shared=None if experts.shared is None else self._dense(experts.shared),
            shared_gate=None if gate is None else make(gate.weight, gate.bias),
        )
        _drop(experts.router, experts, *([] if gate is None else [gate]))
        return sparse

    def _mixture_beside(self, beside: spec.Beside) -> _Beside:
        return _Beside(
            self._sparse(beside.experts),
            self._normalize(beside.router_in),
            self._normalize(beside.experts_in),
            self._normalize(beside.mlp_out),
            self._kernels.make_norm_add(
                beside.experts_out.weight, beside.experts_out.eps, beside.experts_out.offset, 1.0
            ),
        )

    def _norm_add(self, norm: spec.Norm | None, scale: float = 1.0) -> NormAdd | None:
        """A norm behind a block, with the residual sum after it, and what leaves the layer times `scale`."""
        if norm is None:
            return None
        normalize, inner = self._normalize(norm), self._spec.residual_scale
        if inner != 1.0:
            return lambda x, residual: residual + normalize(x) * inner
        if norm.mean:
            return lambda x, residual: residual + normalize(x)
        return self._kernels.make_norm_add(norm.weight, norm.eps, norm.offset, scale)

    def _normalize(self, norm: spec.Norm | None, into: Sequence[Product] = ()) -> Normalize:
        if norm is None:
            return lambda x: x
        kernels, weight, eps = self._kernels, norm.weight, norm.eps
        if norm.mean:
            return lambda x: kernels.layer_norm(x, weight, norm.bias, eps)
        return kernels.make_norm(weight, eps, norm.offset, into)

    def __call__(
        self,
        input_ids: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
        logits_index: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V] of tokens [T] at `positions` [T], at rows `logits_index` [N] or all; in `out` if given."""
        model = self._spec
        x = self._embed(input_ids)
        if model.embed_scale != 1.0:
            x = x * model.embed_scale
        inputs = None if self._inputs is None else self._inputs(input_ids, x)
        angles = self._angles(positions)
        for index, block in enumerate(self._blocks):
            if index == self._stored and logits_index is not None:
                # Whatever follows brings nothing to later tokens: only those with logits go on.
                narrowed = metadata.narrowed(logits_index, positions)
                if narrowed is not None:
                    metadata, positions = narrowed
                    x, inputs = x[logits_index], None if inputs is None else inputs[logits_index]
                    angles, logits_index = self._angles(positions), None
            x = self._layer(block, x, index, angles, metadata)
            if block.own_input is not None and inputs is not None:
                x = block.own_input(x, inputs)
        if logits_index is not None:
            x = x[logits_index]
        logits = self._head(self._norm(x), None, out)
        if model.logit_scale != 1.0:
            logits = logits.mul_(model.logit_scale)
        if model.logit_softcap > 0:
            logits = logits.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap)
        return logits

    def _angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(rope.cos[positions], rope.sin[positions]) for rope in self._spec.ropes]

    def _layer(
        self,
        block: _Block,
        x: Tensor,
        index: int,
        angles: list[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        normed = block.attention_in(x)
        if isinstance(block.mixer, _Attend):
            mixed = self._attend(block.mixer, normed, index, angles, metadata)
        else:
            mixed = self._carry(block.mixer, normed, metadata.caches[index], metadata)
        if block.layer.parallel:
            x = block.out(mixed, x)
            return self._feed(block, normed, x, metadata.slots)
        x = self._add(block.out, mixed, x, block.attention_out)
        return self._feed(block, block.mlp_in(x), x, metadata.slots)

    def _attend(
        self,
        attend: _Attend,
        normed: Tensor,
        index: int,
        angles: list[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
    ) -> Tensor:
        attention = attend.attention
        held = index if attention.shares is None else attention.shares
        k_cache, v_cache = metadata.caches[held]
        cos, sin = (None, None) if attention.rope is None else angles[attention.rope]
        qkv, q_norm, k_norm = attend.qkv(normed, None), attention.q_norm, attention.k_norm
        if q_norm is not None and k_norm is not None and q_norm.weight.numel() != attention.head_size:
            norms = (q_norm.weight, k_norm.weight, q_norm.eps, q_norm.offset)
            qkv, q_norm, k_norm = self._kernels.norm_whole(qkv, *norms), None, None
        query = self._kernels.rope_store(
            qkv,
            cos,
            sin,
            metadata.slots,
            k_cache,
            v_cache,
            heads=attention.heads,
            q_weight=None if q_norm is None else q_norm.weight,
            k_weight=None if k_norm is None else k_norm.weight,
            eps=1e-6 if q_norm is None else q_norm.eps,
            norm_offset=0.0 if q_norm is None else q_norm.offset,
            interleaved=attention.rope is not None and self._spec.ropes[attention.rope].interleaved,
            value_norm=attention.value_norm,
            stores=attention.shares is None,
        )
        out = metadata.look_up(
            held,
            query,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
            sinks=attention.sinks,
        )
        mixed = out.flatten(1)
        return mixed if attend.gate is None else self._kernels.gate_mul(mixed, attend.gate(normed, None))

    @staticmethod
    def _carry(
        carry: _Carry, normed: Tensor, states: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        x = carry.inputs(normed, None)
        mixed = carry.convolve(x, states[0], metadata.rows)
        if carry.recur is None or carry.gates is None or carry.normalize is None:
            return mixed
        return carry.normalize(carry.recur(mixed, carry.gates(normed), states[1], metadata.rows), x)

    def _feed(self, block: _Block, normed: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        feed = block.feed
        if isinstance(feed, _Sparse):
            mix = self._summed(partial(self._mix, feed, slots=slots))
            return self._add(mix, normed, x, block.mlp_out)
        if block.beside is not None:
            return self._add(partial(self._both, feed, block.beside, x, slots), normed, x, block.mlp_out)
        return self._add(feed.down, self._raise(feed, normed), x, block.mlp_out)

    def _both(
        self,
        feed: _Dense,
        beside: _Beside,
        x: Tensor,
        slots: Tensor,
        normed: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        """What the MLP brings for `normed`, and the experts beside it for x."""
        dense, sparse = feed.down(self._raise(feed, normed), None), beside.sparse
        ids, weights = self._kernels.route(sparse.router(beside.router_in(x)), sparse.routing, slots)
        mix = self._summed(lambda rows, added: sparse.mix(rows, ids, weights, added))
        return beside.experts_out(mix(beside.experts_in(x), None), beside.mlp_out(dense))

    def _raise(self, dense: _Dense, normed: Tensor) -> Tensor:
        """What goes into the down product: act(gate) * up, or act(up)."""
        hidden = dense.up(normed, None)
        return hidden if dense.activation is None else self._kernels.activate(hidden, dense.activation)

    def _mix(self, sparse: _Sparse, normed: Tensor, residual: Tensor | None, *, slots: Tensor) -> Tensor:
        """The chosen experts' sum, plus the shared one's, plus the residual."""
        ids, weights = self._kernels.route(sparse.router(normed), sparse.routing, slots)
        if sparse.shared is not None:
            hidden = self._raise(sparse.shared, normed)
            if sparse.shared_gate is None:
                residual = sparse.shared.down(hidden, residual)
            else:
                common = sparse.shared.down(hidden, None)
                residual = self._kernels.gate_add(common, sparse.shared_gate(normed, None), residual)
        return sparse.mix(normed, ids, weights, residual)

    def _add(
        self,
        product: Sum,
        hidden: Tensor,
        x: Tensor,
        norm: NormAdd | None,
    ) -> Tensor:
        scale = self._spec.residual_scale
        if norm is not None:
            return norm(product(hidden, None), x)
        return product(hidden, x) if scale == 1.0 else x + product(hidden, None) * scale


def _layers_until_all_is_stored(layers: Sequence[spec.Layer]) -> int:
    """How many layers there are before the plain ones at the end that use other layers' keys and values."""
    count = len(layers)
    while count:
        layer = layers[count - 1]
        shares = isinstance(layer.mixer, spec.Attention) and layer.mixer.shares is not None
        if not shares or layer.beside is not None or not isinstance(layer.mlp, spec.MLP):
            break
        count -= 1
    return count


def _drop(*parts: spec.Linear | spec.Experts | spec.DecoderSpec) -> None:
    """Let go of weights that the kernels have taken over."""
    for part in parts:
        if isinstance(part, spec.Linear):
            part.weight, part.bias = NOTHING, None
        elif isinstance(part, spec.Experts):
            part.gate_up = part.down = NOTHING
            part.gate_up_bias = part.down_bias = None
        else:
            part.embedding = NOTHING

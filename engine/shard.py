"""One rank's part of a decoder: which rows and columns of its matrices a rank holds.

    q, k, v, gate, up     rows     a rank's heads, and as many hidden values       [out / N, in]
    out, down             columns  that read them: a partial sum of all outputs    [out, in / N]
    head                  rows     a rank's tokens, the last rank's filled up      [V / N, in]
    embedding, norms, router       whole, with the router's biases, and so what layers add of a token's own

So a layer's ranks meet twice, to add up what attention and the MLP bring. What is added once (the biases of out
and down, the residual) belongs to rank 0. Parts are views as long as they stay on the device that the weights
are on: of a mapped file only those bytes are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.engine.attention import Kept
from tokenmill.engine.block_weight import Weight, full
from tokenmill.engine.decoder_spec import MLP, Attention, DecoderSpec, Experts, Linear, replace_tensors
from tokenmill.engine.describe import kept_by
from tokenmill.engine.load_error import LoadError

HEAD_ROWS = 16
"""A rank's logits are a multiple of so many, as matrix units like them."""


@dataclass(frozen=True, slots=True)
class Share:
    """Rank `rank` of `size`."""

    rank: int
    size: int

    def of(self, count: int) -> slice:
        """This rank's of `count` things, which the number of ranks divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def of_kv_heads(self, count: int) -> slice:
        """This rank's KV heads: where there are fewer than ranks, neighbouring ranks keep the same one."""
        first = self.rank * count // self.size
        return slice(first, first + max(1, count // self.size))


def shard(model: DecoderSpec, share: Share, device: torch.device) -> list[Kept]:
    """Cut `model` down to this rank's part, on `device`; what its layers then keep in the cache.

    Raises LoadError where the number of ranks doesn't divide something.
    """
    refuse_uneven(model, share.size)
    for layer in model.layers:
        assert isinstance(layer.mixer, Attention)
        _cut_attention(layer.mixer, share)
        _cut_feed(layer.mlp, share)
        if layer.beside is not None:
            _cut_feed(layer.beside.experts, share)
    tied = model.head.weight is model.embedding
    if not tied:
        _cut_head(model.head, share)
    replace_tensors(model, lambda tensor: tensor.to(device))
    if tied:  # a view of what is there anyway
        model.head.weight = model.embedding
        _cut_head(model.head, share)
    return kept_by(model)


def refuse_uneven(model: DecoderSpec, size: int) -> None:
    """Raise LoadError where `model` can't be cut into `size` equal parts."""
    for layer in model.layers:
        attention = layer.mixer
        if not isinstance(attention, Attention) or attention.gate is not None:
            raise LoadError(
                "tensor_parallel: layers that carry a state, or whose attention is gated, aren't cut"
            )
        _require(attention.heads, size, "query heads")
        if size % attention.kv_heads:
            _require(attention.kv_heads, size, "KV heads")
        norm = attention.q_norm
        if norm is not None and norm.weight.numel() != attention.head_size:
            raise LoadError("tensor_parallel: its query norm spans all heads, of which a rank has a part")
        _refuse_uneven_feed(layer.mlp, size)
        if layer.beside is not None:
            _refuse_uneven_feed(layer.beside.experts, size)


def _refuse_uneven_feed(feed: MLP | Experts, size: int) -> None:
    if isinstance(feed, MLP):
        _require(feed.down.weight.shape[1], size, "hidden values of the MLP")
        return
    _require(feed.inner, size, "hidden values of an expert")
    if feed.shared is not None:
        _require(feed.shared.down.weight.shape[1], size, "hidden values of the shared expert")


def _require(count: int, size: int, what: str) -> None:
    if count % size:
        raise LoadError(f"tensor_parallel {size} doesn't divide its {count} {what}; take a number that does")


def _cut_attention(attention: Attention, share: Share) -> None:
    width, kv_heads = attention.head_size, attention.kv_heads
    heads, kept = share.of(attention.heads), share.of_kv_heads(kv_heads)
    parts = [heads, kept, kept] if attention.shares is None else [heads]
    sizes = [attention.heads * width, kv_heads * width, kv_heads * width][: len(parts)]
    attention.qkv = [
        _rows(part, slice(own.start * width, own.stop * width))
        for part, own in zip(_apart(attention.qkv, sizes), parts, strict=True)
    ]
    attention.out = _columns(attention.out, slice(heads.start * width, heads.stop * width), share)
    attention.heads, attention.kv_heads = heads.stop - heads.start, kept.stop - kept.start
    if attention.sinks is not None:
        attention.sinks = attention.sinks[heads]


def _cut_feed(feed: MLP | Experts, share: Share) -> None:
    if isinstance(feed, MLP):
        _cut_mlp(feed, share)
        return
    feed.arrange()
    inner = feed.inner
    own = share.of(inner)

    def halves(whole: Tensor) -> Tensor:
        return torch.cat([whole[:, :inner][:, own], whole[:, inner:][:, own]], dim=1)

    feed.gate_up, feed.down = halves(full(feed.gate_up)), full(feed.down)[:, :, own]
    feed.gate_up_bias = None if feed.gate_up_bias is None else halves(feed.gate_up_bias)
    feed.down_bias = feed.down_bias if share.rank == 0 else None
    if feed.shared is not None:
        _cut_mlp(feed.shared, share)


def _cut_mlp(mlp: MLP, share: Share) -> None:
    inner = mlp.down.weight.shape[1]
    own = share.of(inner)
    parts = _apart(mlp.gate_up, [inner, inner] if mlp.gated else [inner])
    mlp.gate_up = [_rows(part, own) for part in parts]
    mlp.down = _columns(mlp.down, own, share)


def _cut_head(head: Linear, share: Share) -> None:
    """A rank's rows; zeros stand where the last ranks have none."""
    total = head.weight.shape[0]
    each = rows_of_head(total, share.size)
    start = min(share.rank * each, total)
    stop = min(start + each, total)
    missing = each - (stop - start)
    weight = _tensor(head.weight)[start:stop]
    head.weight = functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    if head.bias is not None:
        head.bias = functional.pad(head.bias[start:stop], (0, missing))


def rows_of_head(width: int, size: int) -> int:
    """Logits that each rank computes of `width`."""
    return -(-width // (size * HEAD_ROWS)) * HEAD_ROWS


def _apart(linears: list[Linear], sizes: list[int]) -> list[Linear]:
    """Siblings of `sizes` rows; a single one that holds all of them is cut up."""
    if len(linears) == len(sizes):
        return linears
    (joined,) = linears
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_rows(joined, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def _rows(linear: Linear, own: slice) -> Linear:
    return Linear(_tensor(linear.weight)[own], None if linear.bias is None else linear.bias[own])


def _columns(linear: Linear, own: slice, share: Share) -> Linear:
    return Linear(_tensor(linear.weight)[:, own], linear.bias if share.rank == 0 else None)


def _tensor(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor), "team.py refuses weights that stay in a GGUF file's blocks"
    return weight

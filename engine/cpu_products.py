"""Weights packed for the CPU, in the format that the entry's quantization asks for.

None         as they come: bfloat16 or float32
int8, int4   rounded as they are packed; the head to 8 bits either way, since few tokens' logits stand apart
             by less, and it is a large part of a small model. A router, whose choice is all or nothing, never
gguf         the file's blocks with their integers as they are; what the file holds in full stays so

A checkpoint that is packed otherwise (`Groups`) keeps its integers, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenmill.engine.block_weight import BlockWeight, ExpertBlocks, Experts, Weight, full, join_biases
from tokenmill.engine.config import Quantization
from tokenmill.engine.group_weight import GroupExperts, GroupWeight, joined_groups
from tokenmill.kernels.cpu import elementwise
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.cpu.quantized import QuantizedLinear, largest_factor, largest_scale, magnitude
from tokenmill.kernels.groups import Groups

BITS: dict[Quantization | None, int] = {"int8": 8, "int4": 4}
HEAD_BITS = 8


class CpuProduct:
    """One product over the rows of several weights.

    They are packed together where one format holds them; a GGUF file may mix types among siblings, whose results
    are then joined: `gate` (else None) is what becomes of gate and up rows that could not be packed together.
    """

    def __init__(self, parts: list[PackedLinear], gate: str | None = None) -> None:
        self.parts = parts
        self.gate = gate

    @property
    def packed(self) -> PackedLinear | None:
        """The one packed weight, if it is one."""
        return self.parts[0] if len(self.parts) == 1 else None

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x [T, in], residual [T, out] or None → [T, out], in `out` if given."""
        if self.packed is not None:
            return self.packed(x, residual, out)
        result = torch.cat([part(x) for part in self.parts], dim=1)
        if self.gate is not None:
            result = elementwise.activation_mul(result, self.gate)
        if residual is not None:
            result = result + residual
        return result if out is None else out.copy_(result)


def pack(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    gate: str | None,
    quantization: Quantization | None,
) -> CpuProduct:
    """One product over the rows of all `weights`; `gate`: they are gate and up rows, act(gate) * up results."""
    bits = BITS.get(quantization)
    groups = joined_groups(weights)
    if groups is not None:
        return CpuProduct([_pack_groups(groups, weights[0].dtype, join_biases(weights, biases), gate)])
    if len({_form(weight) for weight in weights}) == 1:
        return CpuProduct([_pack_one(_join(weights), join_biases(weights, biases), gate, bits)])
    parts = [_pack_one(weight, bias, None, bits) for weight, bias in zip(weights, biases, strict=True)]
    return CpuProduct(parts, gate)


def pack_head(weight: Weight, bias: Tensor | None, quantization: Quantization | None) -> CpuProduct:
    """The product that brings logits, whose rows may serve as the embedding too."""
    return CpuProduct([_pack_one(weight, bias, None, HEAD_BITS if quantization in BITS else None)])


def pack_experts(
    weights: Experts, biases: Tensor | None, gate: str | None, quantization: Quantization | None
) -> list[PackedLinear]:
    """One product for each of `weights` [X, out, in], with `biases` [X, out]: all in one format."""
    bits = BITS.get(quantization)
    added = [None] * len(weights) if biases is None else list(biases)
    if isinstance(weights, ExpertBlocks):
        kind = weights.kind
        most = max(largest_scale(blocks, kind) for tensor in weights.tensors for blocks in tensor)
        return [
            QuantizedLinear.from_blocks(weights[i].blocks, kind, bias, gate, most)
            for i, bias in enumerate(added)
        ]
    if isinstance(weights, GroupExperts):
        try:
            experts = weights.groups()
            largest = max(map(largest_factor, experts))
            return [
                QuantizedLinear.from_groups(expert, bias, gate, largest)
                for expert, bias in zip(experts, added, strict=True)
            ]
        except ValueError:
            weights = full(weights)
    if bits is None:
        return [PackedLinear(weight, bias, gate) for weight, bias in zip(weights, added, strict=True)]
    largest = max(magnitude(weight) for weight in weights)
    return [
        QuantizedLinear(weight, bits, None, bias, gate, largest)
        for weight, bias in zip(weights, added, strict=True)
    ]


def table_of(weight: Weight, head: object) -> Tensor | PackedLinear:
    """What an embedding looks its rows up in: the packed head where the two are one, packed blocks, a tensor."""
    if isinstance(head, CpuProduct) and head.packed is not None:
        return head.packed
    return weight if isinstance(weight, Tensor) else _pack_one(weight, None, None, None)


def _pack_one(weight: Weight, bias: Tensor | None, gate: str | None, bits: int | None) -> PackedLinear:
    if isinstance(weight, BlockWeight):
        return QuantizedLinear.from_blocks(weight.blocks, weight.kind, bias, gate)
    if isinstance(weight, GroupWeight):
        return _pack_groups(weight.read(), weight.dtype, bias, gate)
    if bits is not None:
        return QuantizedLinear(weight, bits, None, bias, gate)
    return PackedLinear(weight, bias, gate)


def _pack_groups(groups: Groups, dtype: torch.dtype, bias: Tensor | None, gate: str | None) -> PackedLinear:
    """The groups as they are; their values in `dtype` where no packed form takes them."""
    try:
        return QuantizedLinear.from_groups(groups, bias, gate)
    except ValueError:
        return PackedLinear(groups.values().to(dtype), bias, gate)


def _form(weight: Weight) -> object:
    """The same for weights that can be packed together; groups come apart where they couldn't be joined."""
    if isinstance(weight, GroupWeight):
        return id(weight)
    return weight.kind if isinstance(weight, BlockWeight) else None


def _join(weights: Sequence[Weight]) -> Weight:
    """One weight of all rows, of weights of one format."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, BlockWeight):
        blocks = [weight.blocks for weight in weights if isinstance(weight, BlockWeight)]
        return BlockWeight(torch.cat(blocks), first.kind, first.dtype)
    return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])

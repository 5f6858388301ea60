"""Weights that stay in GGUF's quantized blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.engine.group_weight import GroupExperts, GroupWeight


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A weight [out, in] in whole blocks of one of GGUF's types."""

    blocks: Tensor  # [out, bytes of a row] uint8
    kind: str
    """The type as GGUF calls it: Q4_1, Q6_K."""
    dtype: torch.dtype
    """What its values are in when they are asked for, and what activations are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.blocks.shape[0], _elements(self.blocks, self.kind)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What holds the blocks."""
        return (self.blocks,)

    def values(self) -> Tensor:
        """The weight [out, in] in full."""
        from gguf import GGMLQuantizationType, dequantize

        exact = dequantize(self.blocks.numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(exact).to(self.dtype)

    def parameter(self) -> Tensor:
        """As the model has it."""
        return self.values()


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """The weights [X, out, in] of a layer's experts. A file may hold their rows in several tensors: gate, then up."""

    tensors: tuple[Tensor, ...]  # each [X, its rows, bytes of a row] uint8
    kind: str
    dtype: torch.dtype
    turned: bool = False
    """Whether the model's own parameter is [X, in, out], gates and ups in turn."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, outputs and inputs."""
        rows = sum(tensor.shape[1] for tensor in self.tensors)
        return self.tensors[0].shape[0], rows, _elements(self.tensors[0], self.kind)

    def __getitem__(self, expert: int) -> BlockWeight:
        rows = [tensor[expert] for tensor in self.tensors]
        return BlockWeight(rows[0] if len(rows) == 1 else torch.cat(rows), self.kind, self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def values(self) -> Tensor:
        """The weights [X, out, in] in full."""
        return torch.stack([self[expert].values() for expert in range(len(self))])

    def parameter(self) -> Tensor:
        """The weights as the model has them."""
        values = self.values()
        if not self.turned:
            return values
        if len(self.tensors) == 2:
            values = torch.stack(values.chunk(2, dim=1), dim=2).flatten(1, 2)
        return values.mT.contiguous()


def _elements(blocks: Tensor, kind: str) -> int:
    """How many values a row holds."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return blocks.shape[-1] // width * elements


Weight = Tensor | BlockWeight | GroupWeight
Experts = Tensor | ExpertBlocks | GroupExperts
"""[X, out, in]"""
Blocks = BlockWeight | ExpertBlocks | GroupWeight | GroupExperts
"""What stays packed."""


def full(experts: Experts) -> Tensor:
    """Experts' weights [X, out, in], unpacked."""
    return experts if isinstance(experts, Tensor) else experts.values()


def join(weights: Sequence[Weight]) -> Tensor:
    """One weight of all rows, in full."""
    full = [weight if isinstance(weight, Tensor) else weight.values() for weight in weights]
    return full[0] if len(full) == 1 else torch.cat(full)


def join_biases(weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """One bias of all rows, zeros where a part has none; None if none has."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [like.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )

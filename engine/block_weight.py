"""A weight that stays in GGUF's quantized blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        elements, width = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.blocks.shape[0], self.blocks.shape[1] // width * elements

    def values(self) -> Tensor:
        """The weight [out, in] in full."""
        from gguf import GGMLQuantizationType, dequantize

        exact = dequantize(self.blocks.numpy(), GGMLQuantizationType[self.kind])
        return torch.from_numpy(exact).to(self.dtype)


Weight = Tensor | BlockWeight


def join(weights: Sequence[Weight]) -> Tensor:
    """One weight of all rows, in full."""
    full = [weight.values() if isinstance(weight, BlockWeight) else weight for weight in weights]
    return full[0] if len(full) == 1 else torch.cat(full)


def join_biases(weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """One bias of all rows, zeros where a part has none; None if none has."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [like.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )

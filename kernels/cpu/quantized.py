"""Linear layers over quantized weights that stay packed: rounded here, or as GGUF and other files have them.

    unit * (scale * q + minimum)     q exact integers, scale and minimum in half precision for each group

The integers are multiplied as they are; scale and minimum meet the float32 sums of their group. So the
result is that of the dequantized weight in float32, up to the order of summation, and `PackedLinear`'s
promise holds: a row is the same bits in every batch.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import TYPES, required
from tokenmill.kernels.cpu.linear import FLOAT4, INT4, INT8, PackedLinear, PackedStruct
from tokenmill.kernels.groups import Groups


class GroupsStruct(ctypes.Structure):
    """`Groups` of src/quantize.cpp."""

    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("minima", ctypes.c_void_p))


@dataclass(frozen=True)
class BlockKind:
    """One of GGUF's block types, and the packed form that holds it without loss of its integers."""

    number: int
    """As src/gguf.h counts them."""
    elements: int
    block_bytes: int
    format: int
    group: int
    zero_point: int = 0
    minima: bool = False
    scale_at: tuple[int, ...] = ()
    """Where the half-precision factors of a super-block stand; group scales are products with these."""
    scale_factor: int = 1
    """The largest integer that such a factor is multiplied with."""
    powers: bool = False
    """Whether a block begins with its scale as a power of two, in a byte."""


BLOCKS = {
    "Q4_0": BlockKind(16, 32, 18, INT4, 32, zero_point=8),
    "Q4_1": BlockKind(17, 32, 20, INT4, 32, minima=True),
    "Q5_0": BlockKind(18, 32, 22, INT8, 32),
    "Q5_1": BlockKind(19, 32, 24, INT8, 32, minima=True),
    "Q8_0": BlockKind(20, 32, 34, INT8, 32),
    "Q4_K": BlockKind(21, 256, 144, INT4, 32, minima=True, scale_at=(0, 2), scale_factor=63),
    "Q5_K": BlockKind(22, 256, 176, INT8, 32, minima=True, scale_at=(0, 2), scale_factor=63),
    "Q6_K": BlockKind(23, 256, 210, INT8, 16, scale_at=(208,), scale_factor=128),
    "MXFP4": BlockKind(24, 32, 17, FLOAT4, 32, powers=True),
}
"""GGUF types by name. Q5 and Q6 integers take a byte each once packed."""

GROUPED = {"int4": INT4, "fp4": FLOAT4, "int8": INT8}
"""The packed form of each of `groups.Kind` that there is one for."""
GROUPS_SOURCE = 32
"""As src/gguf.h has it."""

GROUPS = (32, 64, 128)
"""Group sizes that `QuantizedLinear` rounds to, besides whole rows."""


class QuantizedLinear(PackedLinear):
    """A weight [out, in], bfloat16 or float32, rounded to 8 or 4 bits as it is packed.

    8 bits are symmetric, one scale for each output or for each `group` of inputs; 4 bits have a scale and a
    minimum for each group (32 by default). Bias and activation are `PackedLinear`'s. `largest` is the largest
    magnitude of it and of those that it shall share one unit of scales with; by default its own.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        group: int | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        largest: float | None = None,
    ) -> None:
        if weight.dtype not in TYPES or weight.dim() != 2:
            raise ValueError(f"a weight must be bfloat16 or float32 [out, in], not {weight.dtype}")
        if bits not in (4, 8):
            raise ValueError(f"bits must be 8 or 4, not {bits}")
        if group is None:
            group = 32 if bits == 4 else -(-weight.shape[1] // 32) * 32
        elif group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS}, not {group}")
        if largest is None:
            largest = magnitude(weight)
        struct = PackedStruct(format=INT4 if bits == 4 else INT8, group=group, minima=bits == 4)
        struct.unit = _unit(largest if bits == 4 else largest / 127)
        weight = weight.contiguous()
        self._fill(struct, TYPES[weight.dtype], weight.data_ptr(), tuple(weight.shape), activation)
        self._set_bias(bias)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        kind: str,
        bias: Tensor | None = None,
        activation: str | None = None,
        largest: float | None = None,
    ) -> QuantizedLinear:
        """From GGUF blocks [out, bytes of a row] uint8 of a type in BLOCKS; rows may have been permuted.

        `largest` is the largest of `largest_scale` over it and those that it shall share a unit with.
        """
        if kind not in BLOCKS:
            raise ValueError(f"block type must be one of {', '.join(BLOCKS)}, not {kind}")
        block = BLOCKS[kind]
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % block.block_bytes:
            raise ValueError(
                f"{kind} blocks must be uint8 [out, n * {block.block_bytes}], not {list(blocks.shape)}"
            )
        blocks = blocks.contiguous()
        struct = PackedStruct(
            format=block.format, group=block.group, zero_point=block.zero_point, minima=block.minima, unit=1.0
        )
        if block.scale_at or block.powers:
            struct.unit = _unit(largest_scale(blocks, kind) if largest is None else largest)
        linear = cls.__new__(cls)
        inputs = blocks.shape[1] // block.block_bytes * block.elements
        linear._fill(struct, block.number, blocks.data_ptr(), (blocks.shape[0], inputs), activation)
        linear._set_bias(bias)
        return linear

    @classmethod
    def from_groups(
        cls,
        weight: Groups,
        bias: Tensor | None = None,
        activation: str | None = None,
        largest: float | None = None,
    ) -> QuantizedLinear:
        """From a weight [out, in] of a kind in GROUPED; scales and minima are rounded to half precision.

        `largest` is the largest of `largest_factor` over it and those that it shall share a unit with.
        """
        if weight.kind not in GROUPED:
            raise ValueError(f"the kind of groups must be one of {', '.join(GROUPED)}, not {weight.kind}")
        if weight.inputs % 2:
            raise ValueError(f"inputs must be even, not {weight.inputs}")
        codes, (scale, minimum, group) = weight.codes.contiguous(), _regrouped(weight)
        struct = PackedStruct(format=GROUPED[weight.kind], group=group, minima=minimum is not None)
        struct.zero_point = 8 if weight.kind == "int4" and minimum is None else 0
        struct.unit = _unit(largest_factor(weight) if largest is None else largest)
        minima = None if minimum is None else minimum.data_ptr()
        source = GroupsStruct(codes.data_ptr(), scale.data_ptr(), minima)
        linear = cls.__new__(cls)
        linear._fill(struct, GROUPS_SOURCE, ctypes.addressof(source), weight.shape, activation)
        linear._set_bias(bias)
        return linear

    def _fill(
        self,
        struct: PackedStruct,
        source: int,
        address: int,
        shape: tuple[int, ...],
        activation: str | None,
    ) -> None:
        outputs, inputs = shape
        self._lay_out(struct, outputs, inputs, activation)
        required().tm_pack_quantized(self._address, source, address, self.data.data_ptr())


def largest_factor(weight: Groups) -> float:
    """The largest magnitude of the scales and minima that its packed form has."""
    scale = magnitude(weight.scale) / (2 if weight.kind == "fp4" else 1)
    return scale if weight.minimum is None else max(scale, magnitude(weight.minimum))


def _regrouped(weight: Groups) -> tuple[Tensor, Tensor | None, int]:
    """Scales and minima [out, groups] by groups that the kernels know, and the size of these."""
    # The integers of 4-bit floats are twice what they stand for.
    scale = weight.scale.float() / 2 if weight.kind == "fp4" else weight.scale.float()
    if scale.shape[-1] == 1 and weight.kind == "int8" and weight.minimum is None:
        return scale.contiguous(), None, -(-weight.inputs // 32) * 32
    size = next((x for x in (*reversed(GROUPS), 16) if weight.group % x == 0), None)
    if size is None:
        raise ValueError(f"groups of {weight.group} inputs are no multiple of 16")
    if size == 16 and weight.inputs % 32:
        raise ValueError(f"groups of 16 inputs come in pairs, which {weight.inputs} inputs don't")

    def spread(each: Tensor) -> Tensor:
        repeated = each.repeat_interleave(weight.group // size, -1)
        return repeated[:, : -(-weight.inputs // size)].contiguous()

    return spread(scale), None if weight.minimum is None else spread(weight.minimum.float()), size


def largest_scale(blocks: Tensor, kind: str) -> float:
    """The largest magnitude of the scales and minima in blocks [out, bytes of a row]; 0 where they need no unit."""
    block = BLOCKS[kind]
    if block.powers:
        return math.ldexp(1.0, int(blocks.view(-1, block.block_bytes)[:, 0].amax()) - 128)
    factors = [float(_halves(blocks, block, at).abs().amax()) for at in block.scale_at]
    return max(factors, default=0.0) * block.scale_factor


def magnitude(weight: Tensor) -> float:
    """The largest absolute value."""
    return float(weight.abs().amax()) if weight.numel() else 0.0


def _halves(blocks: Tensor, block: BlockKind, at: int) -> Tensor:
    """The half-precision numbers at one place of every block, as float32."""
    each = blocks.view(-1, block.block_bytes)[:, at : at + 2].contiguous()
    return each.view(torch.float16).float()


def _unit(largest: float) -> float:
    """The power of two that brings the largest scale near the top of half precision's range."""
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 15)

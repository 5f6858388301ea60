"""Weights kept in 8 or 4 bits: e4m3 or int8 with a scale an output, int4 with a scale a group of inputs.

int4 bytes are laid out for the kernel: within each two groups of inputs byte j holds input j of the first
group in its low and input j of the second in its high four bits, so that unpacking gives two tiles and moves
nothing between threads. Codes are integers with 8 added, or 4-bit floats (e2m1), which count as twice their value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import FP8, FP8_MAX
from tokenmill.kernels.groups import FLOATS4, Groups, nibbles

INTEGERS, FLOATS, WITH_MINIMA = range(3)
"""What 4 bits are: integers times a scale; floats times one; integers times a scale, plus a minimum."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [..., out, in]; leading dimensions, if any, are experts."""

    data: Tensor  # [..., out, in] float8_e4m3fn or int8; int4: [..., out, in / 2] uint8
    scale: Tensor  # [..., out] float32; int4: [..., out, in / group] float32, and as many minima behind them
    group: int  # inputs that share a scale; 0: all of an output's
    form: int = INTEGERS

    def dequantized(self) -> Tensor:
        """The float32 weight [..., out, in] that this stands for."""
        if not self.group:
            return self.data.float() * self.scale[..., None]
        runs = self.data.reshape(*self.data.shape[:-1], -1, self.group)
        codes = torch.cat([runs & 15, runs >> 4], dim=-1).flatten(-2)
        if self.form == FLOATS:
            table = torch.tensor([*FLOATS4, *(-x for x in FLOATS4)], device=codes.device)
            return 2 * table[codes.int()] * self.scale.repeat_interleave(self.group, dim=-1)
        scale, *minimum = self.scale.chunk(2 if self.form == WITH_MINIMA else 1, dim=-1)
        values = (codes.float() - 8.0) * scale.repeat_interleave(self.group, dim=-1)
        return values + minimum[0].repeat_interleave(self.group, dim=-1) if minimum else values


def stored(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """(data, scale, group) of a weight; a plain one is its own data, and its scale isn't to be read."""
    if isinstance(weight, QuantizedWeight):
        return weight.data, weight.scale, weight.group
    return weight, weight, 0


def form_of(weight: Tensor | QuantizedWeight) -> int:
    """What 4 bits of a weight are, if it has such."""
    return weight.form if isinstance(weight, QuantizedWeight) else INTEGERS


def hold(weight: Groups) -> QuantizedWeight:
    """A weight as a checkpoint packs it, its values unchanged; raises ValueError where no product here reads it."""
    if weight.kind in ("int8", "fp8"):
        if weight.scale.shape[-1] != 1 or weight.minimum is not None:
            raise ValueError("8 bits with more than a scale an output")
        return QuantizedWeight(weight.codes.contiguous(), weight.scale[..., 0].float().contiguous(), 0)
    group = next((x for x in (128, 64, 32) if weight.group % x == 0 and weight.inputs % (2 * x) == 0), None)
    if group is None:
        raise ValueError(f"{weight.inputs} inputs in groups of {weight.group}, not pairs of 32, 64 or 128")

    def spread(each: Tensor) -> Tensor:
        whole = each.float().repeat_interleave(weight.group // group, -1)
        return whole[..., : weight.inputs // group]

    runs = nibbles(weight.codes).reshape(*weight.codes.shape[:-1], -1, 2, group)
    data, scale = (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(-2), spread(weight.scale)
    if weight.kind == "fp4":
        return QuantizedWeight(data, (scale / 2).contiguous(), group, FLOATS)
    if weight.minimum is None:
        return QuantizedWeight(data, scale.contiguous(), group)
    # The kernel takes 8 off every integer.
    minimum = spread(weight.minimum) + 8 * scale
    return QuantizedWeight(data, torch.cat([scale, minimum], dim=-1), group, WITH_MINIMA)


def _channel_scale(weight: Tensor, largest: float) -> Tensor:
    scale = weight.float().abs().amax(-1) / largest
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_fp8(weight: Tensor) -> QuantizedWeight:
    """e4m3 with a scale an output; `weight` [..., out, in]."""
    scale = _channel_scale(weight, FP8_MAX)
    return QuantizedWeight((weight.float() / scale[..., None]).to(FP8), scale, 0)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """Symmetric int8 with a scale an output; `weight` [..., out, in]."""
    scale = _channel_scale(weight, 127.0)
    codes = (weight.float() / scale[..., None]).round().clamp(-127, 127)
    return QuantizedWeight(codes.to(torch.int8), scale, 0)


def quantize_int4(weight: Tensor, group: int = 64) -> QuantizedWeight:
    """Symmetric int4 (-8 .. 7) with a scale a group of 32, 64 or 128 inputs; `weight` [..., out, in]."""
    if group not in (32, 64, 128):
        raise ValueError(f"an int4 group has 32, 64 or 128 inputs, not {group}")
    if weight.shape[-1] % (2 * group):
        raise ValueError(f"{weight.shape[-1]} inputs are no multiple of {2 * group}, two groups")
    grouped = weight.float().reshape(*weight.shape[:-1], -1, group)
    scale = _channel_scale(grouped, 7.0)
    codes = (grouped / scale[..., None]).round().clamp(-8, 7).flatten(-2) + 8.0
    runs = codes.to(torch.uint8).reshape(*weight.shape[:-1], -1, 2, group)
    return QuantizedWeight((runs[..., 0, :] | runs[..., 1, :] << 4).flatten(-2), scale, group)

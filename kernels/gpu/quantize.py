"""Weights kept in 8 or 4 bits: e4m3 or int8 with a scale an output, int4 with a scale a group of inputs.

int4 bytes are laid out for the kernel: within each two groups of inputs byte j holds input j of the first
group in its low and input j of the second in its high four bits, so that unpacking gives two tiles and moves
nothing between threads. Codes are stored with 8 added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import FP8, FP8_MAX


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [..., out, in]; leading dimensions, if any, are experts."""

    data: Tensor  # [..., out, in] float8_e4m3fn or int8; int4: [..., out, in / 2] uint8
    scale: Tensor  # [..., out] float32; int4: [..., out, in / group] float32
    group: int  # inputs that share a scale; 0: all of an output's

    def dequantized(self) -> Tensor:
        """The float32 weight [..., out, in] that this stands for."""
        if not self.group:
            return self.data.float() * self.scale[..., None]
        runs = self.data.reshape(*self.data.shape[:-1], -1, self.group)
        codes = torch.cat([runs & 15, runs >> 4], dim=-1).flatten(-2).float() - 8.0
        return codes * self.scale.repeat_interleave(self.group, dim=-1)


def stored(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor, int]:
    """(data, scale, group) of a weight; a plain one is its own data, and its scale isn't to be read."""
    if isinstance(weight, QuantizedWeight):
        return weight.data, weight.scale, weight.group
    return weight, weight, 0


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

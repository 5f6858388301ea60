"""Safetensors checkpoints whose linear weights are packed, unpacked as they are read.

    fp8                 weight (e4m3)  weight_scale_inv: one, or one for each block of 128 x 128
    compressed-tensors  weight (e4m3 or int8)  weight_scale [weight_zero_point]
                        weight_packed (int32)  weight_scale  weight_shape [weight_zero_point, weight_g_idx]
                        weight_packed (uint8, two 4-bit floats)  weight_scale [weight_global_scale]
    modelopt            weight (e4m3)  weight_scale;  weight (uint8, two 4-bit floats)  weight_scale  weight_scale_2
    gptq                qweight  qzeros  scales [g_idx]: integers packed along the inputs
    awq                 qweight  qzeros  scales: integers packed along the outputs, in an order of their own

Values are computed in float32 and rounded once, to the dtype that the model runs in. What such a checkpoint
says about rounding activations is left out: they stay in full. Formats: the code of compressed-tensors,
AutoGPTQ, AutoAWQ, TensorRT Model Optimizer and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmill.engine.load_error import LoadError
from tokenmill.engine.progress import Progress

FLOATS4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of an int32 belong to."""
COMPANIONS = ("_scale_inv", "_scale", "_scale_2", "_zero_point", "_global_scale", "_shape", "_g_idx")
"""How the names of what belongs to a weight go on after the weight's; beside `qweight` they are its siblings."""
SIBLINGS = ("qzeros", "scales", "g_idx")


def read_packed(
    files: Iterable[Path], settings: dict[str, Any], dtype: torch.dtype, progress: Progress
) -> dict[str, Tensor]:
    """The tensors of all `files` by their names in a plain checkpoint, weights in `dtype`. Raises LoadError.

    `settings`: the checkpoint's `quantization_config`.
    """
    from safetensors import safe_open

    handles: list[Any] = [safe_open(file, framework="pt") for file in files]
    held = {name: handle for handle in handles for name in list(handle.keys())}

    def get(name: str) -> Tensor | None:
        return held[name].get_tensor(name) if name in held else None

    def is_companion(name: str) -> bool:
        stem, _, last = name.rpartition(".")
        if last in SIBLINGS and f"{stem}.qweight" in held:
            return True
        weights = [name.removesuffix(end) for end in COMPANIONS if name.endswith(end)]
        return any(weight in held or f"{weight}_packed" in held for weight in weights)

    packed = _Packed(get, _blocks_of(settings), settings, dtype)
    plain: dict[str, Tensor] = {}
    for done, name in enumerate(held):
        progress("unpacking weights", done / len(held))
        if is_companion(name):
            continue
        stem, _, last = name.rpartition(".")
        if last in ("qweight", "weight_packed"):
            plain[f"{stem}.weight"] = packed.weight(stem, last)
        else:
            tensor = held[name].get_tensor(name)
            narrow = tensor.dtype in EIGHT_BITS or (tensor.dtype is torch.uint8 and f"{name}_scale" in held)
            plain[name] = packed.scaled(name, tensor) if narrow else tensor
    return plain


def _blocks_of(settings: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns under one scale, where scales are by blocks or by groups of columns."""
    block = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        block = block or weights.get("block_structure")
        if not block and weights.get("group_size"):
            block = (1, weights["group_size"])
    rows, columns = block or (128, 128)
    return int(rows), int(columns)


@dataclass(frozen=True, slots=True)
class _Packed:
    """The tensors of one checkpoint and how they are to be read."""

    get: Callable[[str], Tensor | None]
    block: tuple[int, int]
    settings: dict[str, Any]
    dtype: torch.dtype

    def need(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise LoadError(f"the files lack {name}, without which the weights beside it can't be unpacked")
        return tensor

    def weight(self, stem: str, last: str) -> Tensor:
        """The weight [outputs, inputs] of a module whose packed integers have a name of their own."""
        packed = self.need(f"{stem}.{last}")
        try:
            if last == "qweight":
                awq = self.settings["quant_method"] == "awq"
                return (self.awq if awq else self.gptq)(stem, packed).to(self.dtype)
            if packed.dtype is torch.uint8:
                return self.floats(f"{stem}.weight", packed)
            return self.integers(f"{stem}.weight", packed)
        except (RuntimeError, IndexError) as error:
            raise _misfit(f"{stem}.{last}") from error

    def scaled(self, name: str, values: Tensor) -> Tensor:
        """A weight of one value a byte, or two 4-bit floats, that has kept its own name."""
        try:
            if values.dtype is torch.uint8:
                return self.floats(name, values)
            inverse = self.get(f"{name}_scale_inv")
            scale = self.need(f"{name}_scale") if inverse is None else inverse
            zero = self.get(f"{name}_zero_point")
            wide = values.float()
            if zero is not None:
                wide -= spread(zero.float(), values.shape, self.block)
            return wide.mul_(spread(scale.float(), values.shape, self.block)).to(self.dtype)
        except RuntimeError as error:
            raise _misfit(name) from error

    def floats(self, name: str, packed: Tensor) -> Tensor:
        """4-bit floats, the first of two in a byte's lower half. A scale is e4m3 or (a byte) a power of two."""
        table = torch.tensor([*FLOATS4, *(-x for x in FLOATS4)])
        values = table[torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()]
        scale = self.need(f"{name}_scale")
        wide = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
        factor, divisor = self.get(f"{name}_scale_2"), self.get(f"{name}_global_scale")
        if factor is not None:
            wide = wide * factor.float()
        if divisor is not None:
            wide = wide / divisor.float()
        columns = values.shape[-1] // wide.shape[-1]
        return values.mul_(spread(wide, values.shape, (1, columns))).to(self.dtype)

    def integers(self, name: str, packed: Tensor) -> Tensor:
        """compressed-tensors' integers, packed along the inputs and stored with half of their range added."""
        rows, columns = (int(x) for x in self.need(f"{name}_shape"))
        bits = next((b for b in (2, 4, 8) if -(-columns // (32 // b)) == packed.shape[-1]), 0)
        if not bits:
            raise LoadError(
                f"{name} has {packed.shape[-1]} words for {columns} values, no 2, 4 or 8 bits each"
            )
        values = unpack(packed, bits)[:, :columns].float()
        scale = self.need(f"{name}_scale")
        zero, order = self.get(f"{name}_zero_point"), self.get(f"{name}_g_idx")
        centre = torch.tensor(float(1 << (bits - 1)))
        if zero is not None:
            # Packed as the weights are, along the outputs; else as plain integers around 0.
            whole = zero.dtype is torch.int32 and zero.shape != scale.shape
            centre = unpack(zero.T, bits).T[:rows].float() if whole else zero.float() + centre
        if order is not None and bool((order >= 0).all()) and scale.ndim == 2:
            scale = scale[:, order.long()]
            centre = centre[:, order.long()] if centre.ndim == 2 else centre
        values -= spread(centre, values.shape, self.block)
        return values.mul_(spread(scale.float(), values.shape, self.block)).to(self.dtype)

    def gptq(self, stem: str, packed: Tensor) -> Tensor:
        """Integers packed along the inputs, transposed; the first format stores zero points less one."""
        bits = int(self.settings.get("bits", 4))
        values = unpack(packed.T, bits).T.float()
        scales = self.need(f"{stem}.scales").float()
        zeros = unpack(self.need(f"{stem}.qzeros"), bits).float()
        if self.settings.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros += 1
        order = self.get(f"{stem}.g_idx")
        if order is None:
            order = torch.arange(values.shape[0]) // -(-values.shape[0] // scales.shape[0])
        rows = order.long()
        return values.sub_(zeros[rows]).mul_(scales[rows]).T.contiguous()

    def awq(self, stem: str, packed: Tensor) -> Tensor:
        """Integers packed along the outputs, transposed."""
        order = torch.tensor(AWQ_ORDER).argsort()

        def ordered(words: Tensor) -> Tensor:
            return unpack(words, 4).reshape(*words.shape, 8)[..., order].flatten(-2).float()

        values, scales = ordered(packed), self.need(f"{stem}.scales").float()
        rows = torch.arange(values.shape[0]) // (values.shape[0] // scales.shape[0])
        zeros = ordered(self.need(f"{stem}.qzeros"))
        return values.sub_(zeros[rows]).mul_(scales[rows]).T.contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` each out of int32 [..., n], the lowest first: uint8 [..., n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.to(torch.uint8).flatten(-2)


def spread(scale: Tensor, shape: Iterable[int], block: tuple[int, int]) -> Tensor:
    """Scales as they can be multiplied with a weight of `shape`: each for all, for a row, or for a block."""
    *_, rows, columns = sizes = tuple(shape)
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(sizes):
        scale = scale[..., None]
    for dimension, size, each in ((-2, rows, block[0]), (-1, columns, block[1])):
        held = scale.shape[dimension]
        if held in (1, size):
            continue
        width = each if held == -(-size // each) else size // held
        scale = scale.repeat_interleave(width, dimension).narrow(dimension, 0, size)
    return scale


def _misfit(name: str) -> LoadError:
    return LoadError(f"{name} and its scales don't fit together; fetch the checkpoint again")

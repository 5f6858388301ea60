"""Safetensors checkpoints whose linear weights are packed: kept so where the kernels read them, else unpacked.

    fp8                 weight (e4m3)  weight_scale_inv: one, or one for each block of 128 x 128
    compressed-tensors  weight (e4m3 or int8)  weight_scale [weight_zero_point]
                        weight_packed (int32)  weight_scale  weight_shape [weight_zero_point, weight_g_idx]
                        weight_packed (uint8, two 4-bit floats)  weight_scale [weight_global_scale]
    modelopt            weight (e4m3)  weight_scale;  weight (uint8, two 4-bit floats)  weight_scale  weight_scale_2
    gptq                qweight  qzeros  scales [g_idx]: integers packed along the inputs
    awq                 qweight  qzeros  scales: integers packed along the outputs, in an order of their own
    mxfp4               gate_up_proj_blocks, _scales, down_proj_…: all experts' 4-bit floats (gpt-oss)

All of them come to `Groups`. Unpacked values are computed in float32 and rounded once, to the dtype that the model
runs in. What such a checkpoint says about rounding activations is left out: they stay in full. Formats: the code of
compressed-tensors, AutoGPTQ, AutoAWQ, TensorRT Model Optimizer and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmill.engine.block_weight import Blocks
from tokenmill.engine.group_weight import GroupExperts, GroupWeight
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.progress import Progress
from tokenmill.kernels.groups import Groups, Kind, nibbles

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that each four bits of an int32 belong to."""
COMPANIONS = ("_scale_inv", "_scale", "_scale_2", "_zero_point", "_global_scale", "_shape", "_g_idx")
"""How the names of what belongs to a weight go on after the weight's; beside `qweight` they are its siblings."""
SIBLINGS = ("qzeros", "scales", "g_idx")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
GATES, UPS, DOWNS = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
"""Modules whose outputs choose or weigh experts: their values are looked at."""


def read_packed(
    files: Iterable[Path],
    settings: dict[str, Any],
    dtype: torch.dtype,
    progress: Progress,
    keep: frozenset[Kind] = frozenset(),
    device: torch.device | None = None,
) -> dict[str, Tensor | Blocks]:
    """The tensors of all `files` by their names in a plain checkpoint; raises LoadError.

    Packed weights of a kind in `keep` stay so, to be read onto `device` (default: the CPU); others are unpacked to
    `dtype`, on the CPU. `settings`: the checkpoint's `quantization_config`.
    """
    from safetensors import safe_open

    handles: list[Any] = [safe_open(file, framework="pt") for file in files]
    held = {name: handle for handle in handles for name in list(handle.keys())}

    def get(name: str) -> Tensor | None:
        return held[name].get_tensor(name) if name in held else None

    packed = _Packed(get, _blocks_of(settings), settings, dtype, keep, device or torch.device("cpu"))
    found: dict[str, Tensor | Blocks] = {}
    for done, name in enumerate(held):
        progress("unpacking weights", done / len(held))
        if _is_companion(name, held):
            continue
        stem, _, last = name.rpartition(".")
        if last in ("qweight", "weight_packed"):
            found[f"{stem}.weight"] = packed.weight(stem, last)
        elif name.endswith("_blocks"):
            found[name.removesuffix("_blocks")] = packed.experts(name.removesuffix("_blocks"))
        else:
            tensor = held[name].get_tensor(name)
            narrow = tensor.dtype in EIGHT_BITS or (tensor.dtype is torch.uint8 and f"{name}_scale" in held)
            found[name] = packed.scaled(name, tensor) if narrow else tensor
    _gather_experts(found)
    return found


def _is_companion(name: str, held: dict[str, Any]) -> bool:
    """Whether a tensor belongs to a packed weight."""
    stem, _, last = name.rpartition(".")
    if last in SIBLINGS and f"{stem}.qweight" in held:
        return True
    if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in held:
        return True
    weights = [name.removesuffix(end) for end in COMPANIONS if name.endswith(end)]
    return any(weight in held or f"{weight}_packed" in held for weight in weights)


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
    keep: frozenset[Kind]
    device: torch.device

    def need(self, name: str) -> Tensor:
        tensor = self.get(name)
        if tensor is None:
            raise LoadError(f"the files lack {name}, without which the weights beside it can't be unpacked")
        return tensor

    def weight(self, stem: str, last: str) -> Tensor | GroupWeight:
        """The weight [outputs, inputs] of a module whose packed values have a name of their own."""
        packed = self.need(f"{stem}.{last}")
        if last == "qweight":
            return (self.awq if self.settings["quant_method"] == "awq" else self.gptq)(stem, packed)
        name = f"{stem}.weight"
        return (self.floats if packed.dtype is torch.uint8 else self.integers)(name, packed)

    def scaled(self, name: str, values: Tensor) -> Tensor | GroupWeight:
        """A weight of one value a byte, or two 4-bit floats, that has kept its own name."""
        if values.dtype is torch.uint8:
            return self.floats(name, values)
        inverse = self.get(f"{name}_scale_inv")
        scale = self.need(f"{name}_scale") if inverse is None else inverse
        zero = self.get(f"{name}_zero_point")

        kind: Kind = "fp8" if values.is_floating_point() else "int8"

        def read(device: torch.device) -> Groups:
            by_rows, group = spread(scale.to(device).float(), values.shape, self.block)
            minimum = None
            if zero is not None:
                minimum = -spread(zero.to(device).float(), values.shape, self.block)[0] * by_rows
            return Groups(kind, values.to(device), by_rows, minimum, group)

        return self.held(
            name, kind, values.shape, (values, scale), read, values.dtype is not torch.float8_e5m2
        )

    def floats(self, name: str, packed: Tensor) -> Tensor | GroupWeight:
        """4-bit floats, the first of two in a byte's lower half. A scale is e4m3 or (a byte) a power of two."""
        scale = self.need(f"{name}_scale")
        factor, divisor = self.get(f"{name}_scale_2"), self.get(f"{name}_global_scale")

        def read(device: torch.device) -> Groups:
            wide = _power(scale.to(device)) if scale.dtype is torch.uint8 else scale.to(device).float()
            if factor is not None:
                wide = wide * factor.to(device).float()
            if divisor is not None:
                wide = wide / divisor.to(device).float()
            return Groups("fp4", packed.to(device), wide, None, 2 * packed.shape[-1] // wide.shape[-1])

        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
        return self.held(name, "fp4", shape, (packed, scale), read)

    def experts(self, name: str) -> GroupExperts:
        """gpt-oss's experts [X, out, in], 32 inputs in 16 bytes, a power of two to each."""
        packed, scale = self.need(f"{name}_blocks"), self.need(f"{name}_scales")
        shape = (*packed.shape[:2], 32 * packed.shape[2])

        def read(expert: int) -> Groups:
            codes, powers = packed[expert].to(self.device), _power(scale[expert].to(self.device))
            return Groups("fp4", codes.flatten(-2), powers, None, 32)

        if scale.shape != packed.shape[:3] or packed.shape[3:] != (16,):
            raise _misfit(name)
        return GroupExperts("fp4", shape, self.dtype, (packed, scale), read, turned=True)

    def integers(self, name: str, packed: Tensor) -> Tensor | GroupWeight:
        """compressed-tensors' integers, packed along the inputs and stored with half of their range added."""
        rows, columns = (int(x) for x in self.need(f"{name}_shape"))
        bits = next((b for b in (2, 4, 8) if -(-columns // (32 // b)) == packed.shape[-1]), 0)
        if not bits:
            raise LoadError(
                f"{name} has {packed.shape[-1]} words for {columns} values, no 2, 4 or 8 bits each"
            )
        scale, zero = self.need(f"{name}_scale"), self.get(f"{name}_zero_point")
        order = self.get(f"{name}_g_idx")
        if order is not None and (bool((order < 0).any()) or _in_order(order)):
            order = None

        def read(device: torch.device) -> Groups:
            centre = torch.tensor(float(1 << (bits - 1)), device=device)
            if zero is not None:
                # Packed as the weights are, along the outputs; else as plain integers around 0.
                whole = zero.dtype is torch.int32 and zero.shape != scale.shape
                there = zero.to(device)
                centre = unpack(there.T, bits).T[:rows].float() if whole else there.float() + centre
            by_rows, group = spread(scale.to(device).float(), (rows, columns), self.block)
            centre, _ = spread(centre, (rows, columns), self.block)
            return _integer_groups(packed.to(device), bits, columns, centre, by_rows, group, order)

        kind: Kind = "int4" if bits == 4 else "int8"
        return self.held(name, kind, (rows, columns), (packed, scale), read, order is None)

    def gptq(self, stem: str, packed: Tensor) -> Tensor | GroupWeight:
        """Integers packed along the inputs, transposed; the first format stores zero points less one."""
        bits = int(self.settings.get("bits", 4))
        scales, zeros = self.need(f"{stem}.scales"), self.need(f"{stem}.qzeros")
        order = self.get(f"{stem}.g_idx")
        if order is not None and _in_order(order):
            order = None
        less = int(self.settings.get("checkpoint_format", "gptq") != "gptq_v2")
        columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]

        def read(device: torch.device) -> Groups:
            centre = unpack(zeros.to(device), bits).float().T + less
            group, scale = -(-columns // scales.shape[0]), scales.to(device).float().T
            return _integer_groups(packed.to(device).T, bits, columns, centre, scale, group, order)

        kind: Kind = "int4" if bits == 4 else "int8"
        return self.held(stem, kind, (rows, columns), (packed, scales), read, order is None)

    def awq(self, stem: str, packed: Tensor) -> Tensor | GroupWeight:
        """Integers packed along the outputs, transposed."""
        scales, zeros = self.need(f"{stem}.scales"), self.need(f"{stem}.qzeros")
        columns, rows = packed.shape[0], packed.shape[1] * 8

        def in_order(outputs: Tensor) -> Tensor:
            """[n, words, 4, 2], as nibbles lie in bytes → [n, words * 8]."""
            return outputs.flatten(2)[..., torch.tensor(AWQ_ORDER).argsort()].flatten(1)

        def read(device: torch.device) -> Groups:
            halves = nibbles(zeros.to(device).view(torch.uint8)).view(*zeros.shape, 4, 2)
            scale, centre = scales.to(device).float().T.contiguous(), in_order(halves).float().T
            minimum = None if bool((centre == 8).all()) else -centre * scale
            even, odd = packed.to(device).view(torch.uint8).view(-1, 2, packed.shape[1], 4).unbind(1)
            pairs = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), -1)
            codes = in_order(pairs).T.contiguous()
            return Groups("int4", codes, scale, minimum, columns // scales.shape[0])

        return self.held(stem, "int4", (rows, columns), (packed, scales), read)

    def held(
        self,
        name: str,
        kind: Kind,
        shape: Sequence[int],
        tensors: tuple[Tensor, ...],
        read: Callable[[torch.device], Groups],
        plain: bool = True,
    ) -> Tensor | GroupWeight:
        """What the model gets: the weight as it is packed, or in full. `plain`: its groups lie side by side."""

        def checked(device: torch.device) -> Groups:
            try:
                groups = read(device)
                if groups.shape != tuple(shape):
                    raise _misfit(name)
                if groups.scale.shape != (*shape[:-1], -(-shape[-1] // groups.group)):
                    raise _misfit(name)
            except (RuntimeError, IndexError) as error:
                raise _misfit(name) from error
            return groups

        module = name.removesuffix(".weight").rpartition(".")[2]
        if kind in self.keep and plain and len(shape) == 2 and module not in ROUTERS:
            return GroupWeight(kind, tuple(shape), self.dtype, tensors, partial(checked, self.device))
        return checked(torch.device("cpu")).values().to(self.dtype)


def _integer_groups(
    words: Tensor,
    bits: int,
    columns: int,
    centre: Tensor,
    scale: Tensor,
    group: int,
    order: Tensor | None,
) -> Groups:
    """Unsigned integers in int32 [out, n], `centre` [out, groups] of which stands for zero.

    `order` [columns] says which group each input is of, where they don't follow each other.
    """
    if order is not None:
        rows = order.to(scale.device).long()
        scale, centre, group = scale[:, rows], centre[:, rows], 1
    if bits == 4 and columns % 2 == 0:
        codes = words.contiguous().view(torch.uint8)[:, : columns // 2]
        minimum = None if bool((centre == 8).all()) else -centre * scale
        return Groups("int4", codes, scale.contiguous(), minimum, group)
    shift = 128 if bits == 8 else 0
    codes = (unpack(words, bits)[:, :columns] ^ shift).view(torch.int8)
    minimum = None if bool((centre == shift).all()) else (shift - centre) * scale
    return Groups("int8", codes, scale.contiguous(), minimum, group)


def _gather_experts(found: dict[str, Tensor | Blocks]) -> None:
    """Put `….experts.gate_up_proj` and `….experts.down_proj` in the place of packed experts that lie apart.

    Where they can't be together, they are unpacked.
    """
    layers: dict[str, dict[str, dict[int, GroupWeight]]] = {}
    for name, weight in found.items():
        if isinstance(weight, GroupWeight) and (match := EXPERT.fullmatch(name)):
            stem, expert, part = match.groups()
            layers.setdefault(stem, {}).setdefault(part, {})[int(expert)] = weight
    for stem, parts in layers.items():
        names = [f"{stem}.{expert}.{part}.weight" for part, held in parts.items() for expert in held]
        gate, up, down = (next((parts[x] for x in kinds if x in parts), {}) for kinds in (GATES, UPS, DOWNS))
        try:
            if not len(names) == 3 * len(gate) == sum(x.startswith(f"{stem}.") for x in found):
                raise ValueError("experts of which not all is packed")
            experts = range(len(gate))
            joined = GroupExperts.gathered([(gate[i], up[i]) for i in experts])
            last = GroupExperts.gathered([(down[i],) for i in experts])
        except (ValueError, KeyError):
            for part, held in parts.items():
                found |= {f"{stem}.{i}.{part}.weight": weight.values() for i, weight in held.items()}
            continue
        for name in names:
            del found[name]
        found |= {f"{stem}.gate_up_proj": joined, f"{stem}.down_proj": last}


def _in_order(order: Tensor) -> bool:
    """Whether the groups of inputs follow each other, all of one size."""
    group = int((order == order[0]).sum())
    return torch.equal(order.long(), torch.arange(len(order)) // group)


def _power(exponents: Tensor) -> Tensor:
    """The powers of two that bytes stand for."""
    return torch.exp2(exponents.float() - 127)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` each out of int32 [..., n], the lowest first: uint8 [..., n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return values.to(torch.uint8).flatten(-2)


def spread(scale: Tensor, shape: Sequence[int], block: tuple[int, int]) -> tuple[Tensor, int]:
    """Scales for each row of a weight of `shape` [..., out, groups], and the inputs of a group.

    They come as one for all, one for each row, or one for each block.
    """
    *before, rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape((1,) * len(shape)).expand(*before, rows, 1), columns
    if scale.ndim < len(shape):
        scale = scale[..., None]
    held = scale.shape[-2]
    if held == 1:
        scale = scale.expand(*scale.shape[:-2], rows, scale.shape[-1])
    elif held != rows:
        each = block[0] if held == -(-rows // block[0]) else rows // held
        scale = scale.repeat_interleave(each, -2).narrow(-2, 0, rows)
    held = scale.shape[-1]
    if held in (1, columns):
        return scale, columns // held
    return scale, block[1] if held == -(-columns // block[1]) else columns // held


def _misfit(name: str) -> LoadError:
    return LoadError(f"{name} and its scales don't fit together; fetch the checkpoint again")

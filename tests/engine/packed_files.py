"""Checkpoints packed as others publish them, made from plain ones: (packed folder, plain folder of the same values)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import copy_of, edit_json, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
"""What stands for a weight in the files, by the rest of its name, and its values."""
FLOATS4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers [..., n] as int32, the lowest first; padded with zeros to whole words."""
    each = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % each)).unflatten(-1, (-1, each))
    total = sum(padded[..., i] << (bits * i) for i in range(each))
    assert isinstance(total, Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def tiles(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of each block, [blocks down, blocks across]."""
    height, width = (-weight.shape[0] % rows, -weight.shape[1] % columns)
    padded = torch.nn.functional.pad(weight.abs(), (0, width, 0, height))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))


def grown(scale: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def fp8_blocks(weight: Tensor) -> Packed:
    scale = tiles(weight, 24, 40) / 448
    stored = (weight / grown(scale, weight, 24, 40)).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * grown(scale, weight, 24, 40)


def fp8_rows(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def fp8_whole(weight: Tensor) -> Packed:
    scale = (weight.abs().amax() / 448).reshape(1)
    stored = (weight / scale).to(torch.float8_e4m3fn)
    extra = {"input_scale": torch.ones(1), "weight_scale": scale}
    return {"weight": stored, **extra}, stored.float() * scale


def int8_rows(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def _asymmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsigned integers, zero points and scales of groups of columns, and the values."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    stored = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    values = (stored - zero[..., None]) * scale[..., None]
    return stored.flatten(1), zero, scale, values.flatten(1)


def int4_groups(weight: Tensor) -> Packed:
    scale = tiles(weight, 1, 32) / 7
    stored = (weight / grown(scale, weight, 1, 32)).round().clamp(-8, 7)
    parts = {
        "weight_packed": words(stored + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, stored * grown(scale, weight, 1, 32)


def int4_zeros(weight: Tensor) -> Packed:
    stored, zero, scale, values = _asymmetric(weight, 4, 32)
    parts = {
        "weight_packed": words(stored, 4),
        "weight_scale": scale,
        "weight_zero_point": words(zero.T, 4).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, values


def _floats4(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit floats, two a byte, and what they stand for."""
    table = torch.tensor(FLOATS4)
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    signed = codes + 8 * (scaled < 0)
    return (signed[..., 0::2] + 16 * signed[..., 1::2]).to(torch.uint8), table[codes] * scaled.sign()


def _nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = weight.abs().amax() / (6 * 448)
    scale = (tiles(weight, 1, 16) / 6 / whole).to(torch.float8_e4m3fn)
    wide = grown(scale.float() * whole, weight, 1, 16)
    packed, values = _floats4(weight / wide.clamp(min=1e-12))
    return packed, scale, whole, values * wide


def nvfp4(weight: Tensor) -> Packed:
    packed, scale, whole, values = _nvfp4(weight)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": (1 / whole)[None]}, values


def nvfp4_modelopt(weight: Tensor) -> Packed:
    packed, scale, whole, values = _nvfp4(weight)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.ones(())}
    return parts, values


def mxfp4(weight: Tensor) -> Packed:
    exponents = torch.floor(torch.log2(tiles(weight, 1, 32).clamp(min=1e-12))) - 2
    wide = grown(torch.exp2(exponents), weight, 1, 32)
    packed, values = _floats4(weight / wide)
    return {"weight_packed": packed, "weight_scale": (exponents + 127).to(torch.uint8)}, values * wide


def gptq(weight: Tensor, less: int = 1) -> Packed:
    stored, zero, scale, values = _asymmetric(weight, 4, 32)
    parts = {
        "qweight": words(stored, 4).T.contiguous(),
        "qzeros": words((zero - less).T, 4),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // 32).int(),
    }
    return parts, values


def gptq_ordered(weight: Tensor) -> Packed:
    """As `desc_act` leaves them: the inputs of a group lie anywhere."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
    parts, values = gptq(weight[:, order], less=0)
    back = order.argsort()
    stored, *_ = _asymmetric(weight[:, order], 4, 32)
    parts |= {"qweight": words(stored[:, back], 4).T.contiguous(), "g_idx": parts["g_idx"][back]}
    return parts, values[:, back]


def awq(weight: Tensor) -> Packed:
    stored, zero, scale, values = _asymmetric(weight, 4, 32)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(integers: Tensor) -> Tensor:
        return words(integers.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": packed(stored), "qzeros": packed(zero), "scales": scale.T.contiguous()}, values


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": layout}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


KINDS: dict[str, tuple[Callable[[Tensor], Packed], dict[str, Any]]] = {
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [24, 40]}),
    "float-quantized": (fp8_rows, _compressed("float-quantized", num_bits=8, strategy="channel")),
    "naive-quantized": (fp8_whole, _compressed("naive-quantized", num_bits=8, strategy="tensor")),
    "int-quantized": (int8_rows, _compressed("int-quantized", num_bits=8, strategy="channel")),
    "pack-quantized": (int4_groups, _compressed("pack-quantized", num_bits=4, group_size=32)),
    "asymmetric": (int4_zeros, _compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False)),
    "nvfp4": (nvfp4, _compressed("nvfp4-pack-quantized", num_bits=4, group_size=16)),
    "mxfp4": (mxfp4, _compressed("mxfp4-pack-quantized", num_bits=4, group_size=32)),
    "modelopt-fp8": (fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt-nvfp4": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
    "gptq-desc": (
        gptq_ordered,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "desc_act": True,
            "checkpoint_format": "gptq_v2",
        },
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
}


def packed(kind: str, folder: Path, model_type: str = "llama") -> tuple[Path, Path]:
    """A tiny checkpoint of `model_type` in the packing `kind`, and the same values unpacked."""
    pack, settings = KINDS[kind]
    packed_folder, plain = (copy_of(tiny(model_type), folder / name) for name in ("packed", "plain"))
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            parts, tensors[name] = pack(weight.float())
            del stored[name]
            stored |= {name.removesuffix("weight") + end: x.contiguous() for end, x in parts.items()}
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    save_file(stored, packed_folder / "model.safetensors", {"format": "pt"})
    edit_json(packed_folder / "config.json", quantization_config=settings)
    return packed_folder, plain

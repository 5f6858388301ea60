"""gpt-oss checkpoints with their experts in MXFP4, as they are published: 4-bit floats, 32 under one power of two."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import copy_of, edit_json, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [X, out, in / 32, 16] and scales [X, out, in / 32] of `weight` [X, in, out], and what they stand for."""
    groups = weight.mT.reshape(weight.shape[0], weight.shape[2], -1, GROUP)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    scaled = groups / torch.exp2(exponents)
    codes = (scaled.abs()[..., None] - VALUES).abs().argmin(-1)
    exact = VALUES[codes] * scaled.sign() * torch.exp2(exponents)
    signed = codes + 8 * (scaled < 0)
    blocks = (signed[..., 0::2] + 16 * signed[..., 1::2]).to(torch.uint8)
    return blocks, (exponents[..., 0] + 127).to(torch.uint8), exact.flatten(2).mT.contiguous()


def gpt_oss_in_mxfp4(folder: Path) -> tuple[Path, Path]:
    """A tiny gpt-oss, packed, and the same values unpacked."""
    packed, plain = (copy_of(tiny("gpt_oss"), folder / name) for name in ("packed", "plain"))
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"], tensors[name] = pack(weight)
            del stored[name]
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    edit_json(packed / "config.json", quantization_config={"quant_method": "mxfp4"})
    return packed, plain

"""A GGUF file's tensors under the names of a transformers checkpoint, quantized ones still in their blocks.

    blk.0.attn_q.weight  Q4_1  ──▶  model.layers.0.self_attn.q_proj.weight  BlockWeight (the mapped file)
    output_norm.weight   F32   ──▶  model.norm.weight                       Tensor

Families of which llama.cpp's converter changed no more than names, the order of rows and heads, and norms' offsets
(`gguf_names.py`). The
module is built around weights that take no memory, and the decoder's description of it then gets the blocks in their
place (`stand_ins.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.engine.block_weight import Blocks, BlockWeight, ExpertBlocks
from tokenmill.engine.gguf_names import FAMILIES, Family, checkpoint_name
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.weight_files import GGUFSummary, GGUFTensor
from tokenmill.kernels.cpu.quantized import BLOCKS

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IN_CONFIG = {"rope_freqs.weight"}
"""Tensors that became part of the config (gguf_cache.py)."""
WITH_VALUE_HEADS = (
    "attn_qkv",
    "attn_gate",
    "ssm_conv1d",
    "ssm_alpha",
    "ssm_beta",
    "ssm_a",
    "ssm_dt",
    "ssm_out",
)
"""Tensors of a gated delta net that have something for each of its value heads."""


def is_known(summary: GGUFSummary) -> bool:
    """Whether every tensor of the file can be read here."""
    family = FAMILIES.get(summary.architecture)
    if family is None or any(x.kind not in PLAIN and x.kind not in BLOCKS for x in summary.tensors):
        return False
    try:
        for tensor in summary.tensors:
            if tensor.name not in IN_CONFIG:
                checkpoint_name(tensor.name, family)
    except LoadError:
        return False
    return True


def check_family(summary: GGUFSummary) -> Family:
    """The file's family; raises LoadError where its blocks can't be kept."""
    family = FAMILIES.get(summary.architecture)
    if family is None:
        raise LoadError(
            f"quantization gguf doesn't know the architecture {summary.architecture} "
            f"(it knows {', '.join(FAMILIES)}); leave it out, or say int8 or int4"
        )
    strange = next((x for x in summary.tensors if x.kind not in PLAIN and x.kind not in BLOCKS), None)
    if strange is not None:
        raise LoadError(
            f"quantization gguf: {strange.name} is in {strange.kind} blocks, which no product here reads "
            f"(they read {', '.join(BLOCKS)}); leave it out, or say int8 or int4"
        )
    return family


def read_tensors(
    file: Path, summary: GGUFSummary, config: Any, dtype: torch.dtype
) -> dict[str, Tensor | Blocks]:
    """The file's tensors by the names of a checkpoint of `config`, values in `dtype`; raises LoadError.

    Blocks are views of the mapped file, but for rows that had to change places.
    """
    family = check_family(summary)
    # Copy on write: what torch would take for a writable tensor must not be able to change the file.
    mapped = torch.from_numpy(np.memmap(file, mode="c", dtype=np.uint8))
    found: dict[str, Tensor | Blocks] = {}
    for tensor in summary.tensors:
        if tensor.name in IN_CONFIG or (family.looks_ahead and _stands_behind(tensor.name, config)):
            continue
        weight = _read(mapped, tensor, dtype, family)
        if family.turned and (heads := _turned_heads(tensor.name, config)):
            weight = _rows(weight, torch.arange(weight.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten())
        if family.tiled_heads:
            weight = _heads_in_groups(tensor.name, weight, config)
        found[checkpoint_name(tensor.name, family)] = weight
    _join_experts(found, family)
    return found


def _stands_behind(name: str, config: Any) -> bool:
    """Whether a tensor is of a block behind the model's own."""
    parts = name.split(".")
    return parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= config.num_hidden_layers


def _join_experts(found: dict[str, Tensor | Blocks], family: Family) -> None:
    """Put `….experts.gate_up_proj` and `….experts.down_proj` in the place of the three that a file has."""
    for name in [name for name in found if name.endswith(".experts.gate_proj.weight")]:
        stem = name.removesuffix("gate_proj.weight")
        gate, up, down = (found.pop(f"{stem}{part}_proj.weight", None) for part in ("gate", "up", "down"))
        if isinstance(gate, Tensor) and isinstance(up, Tensor):
            found[f"{stem}gate_up_proj"] = _in_turn(gate, up).mT if family.turned_experts else _one(gate, up)
        elif isinstance(gate, ExpertBlocks) and isinstance(up, ExpertBlocks) and gate.kind == up.kind:
            joined = replace(gate, tensors=(*gate.tensors, *up.tensors), turned=family.turned_experts)
            found[f"{stem}gate_up_proj"] = joined
        else:
            raise LoadError(
                f"quantization gguf: {name} and its up_proj aren't of one type; leave quantization out"
            )
        if isinstance(down, Tensor):
            found[f"{stem}down_proj"] = down.mT if family.turned_experts else down
        elif isinstance(down, ExpertBlocks):
            found[f"{stem}down_proj"] = replace(down, turned=family.turned_experts)
        gates, ups, downs = (found.pop(f"{stem}{part}_proj.bias", None) for part in ("gate", "up", "down"))
        if isinstance(gates, Tensor) and isinstance(ups, Tensor) and isinstance(downs, Tensor):
            found[f"{stem}gate_up_proj_bias"] = _in_turn(gates, ups)
            found[f"{stem}down_proj_bias"] = downs


def _one(gate: Tensor, up: Tensor) -> Tensor:
    """Rows [X, I, …] of gates, then as many of ups."""
    return torch.cat([gate, up], dim=1)


def _in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Rows [X, I, …] of gates and ups, each gate beside its up."""
    return torch.stack([gate, up], dim=2).flatten(1, 2)


def read_values(file: Path, summary: GGUFSummary, name: str) -> Tensor | None:
    """A plain tensor of the file in float32, None where there is none of this name."""
    tensor = next((x for x in summary.tensors if x.name == name and x.kind in PLAIN), None)
    if tensor is None:
        return None
    data = torch.from_numpy(np.fromfile(file, np.uint8, tensor.bytes, offset=tensor.begin))
    return data.view(PLAIN[tensor.kind]).view(tensor.shape).float()


def _read(mapped: Tensor, tensor: GGUFTensor, dtype: torch.dtype, family: Family) -> Tensor | Blocks:
    data = mapped[tensor.begin : tensor.begin + tensor.bytes]
    if tensor.kind not in PLAIN and len(tensor.shape) == 3:
        return ExpertBlocks((data.view(*tensor.shape[:2], -1),), tensor.kind, dtype)
    if tensor.kind not in PLAIN:
        return BlockWeight(data.view(tensor.shape[0], -1), tensor.kind, dtype)
    values = data.view(PLAIN[tensor.kind]).view(tensor.shape)
    if tensor.name.endswith("ffn_gate_inp_shexp.weight"):
        values = values.view(1, -1)  # a matrix of one row, which the converter wrote as a vector
    if tensor.name.endswith(("shortconv.conv.weight", "ssm_conv1d.weight")):
        values = values.unsqueeze(1)  # each channel is convolved by itself
    if tensor.name.endswith("ssm_a"):
        values = (-values).log()
    if tensor.name.endswith("norm.weight") and tensor.name.split(".")[-2] not in family.plain_norms:
        values = values.float() - family.norm_offset
    return values.to(dtype)


def _turned_heads(name: str, config: Any) -> int:
    """How many heads' rows a query or key tensor holds; 0 for other tensors."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0


def _heads_in_groups(name: str, weight: Tensor | Blocks, config: Any) -> Tensor | Blocks:
    """Value heads beside each other that share a key head, where the file has the first of each, then the second."""
    keys, share = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    part = name.split(".", 2)[-1].split(".")[0]
    if share == 1 or part not in WITH_VALUE_HEADS:
        return weight
    heads = torch.arange(keys * share).view(share, keys).T.flatten()
    size = config.linear_value_head_dim
    values = (heads[:, None] * size + torch.arange(size)).flatten()
    if part == "ssm_out":
        return _columns(weight, heads, size)
    if part in ("attn_qkv", "ssm_conv1d"):
        before = weight.shape[0] - len(values)
        return _rows(weight, torch.cat([torch.arange(before), before + values]))
    return _rows(weight, values if part == "attn_gate" else heads)


def _rows(weight: Tensor | Blocks, rows: Tensor) -> Tensor | Blocks:
    if isinstance(weight, BlockWeight):
        return replace(weight, blocks=weight.blocks[rows])
    assert isinstance(weight, Tensor)
    return weight[rows]


def _columns(weight: Tensor | Blocks, order: Tensor, size: int) -> Tensor | Blocks:
    """The inputs of heads of `size` in another order. Where a block reaches over several heads, it is unpacked."""
    if isinstance(weight, BlockWeight):
        if size % BLOCKS[weight.kind].elements == 0:
            heads = weight.blocks.view(weight.shape[0], len(order), -1)
            return replace(weight, blocks=heads[:, order].flatten(1))
        weight = weight.values()
    assert isinstance(weight, Tensor)
    return weight.view(weight.shape[0], len(order), size)[:, order].flatten(1)

"""A GGUF file's tensors under the names of a transformers checkpoint, quantized ones still in their blocks.

    blk.0.attn_q.weight  Q4_1  ──▶  model.layers.0.self_attn.q_proj.weight  BlockWeight (the mapped file)
    output_norm.weight   F32   ──▶  model.norm.weight                       Tensor

Families of which llama.cpp's converter changed no more than names, the order of rows and norms' offsets. The
module is built around weights that take no memory, and the decoder's description of it then gets the blocks in their
place (`stand_ins.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.engine.block_weight import Blocks, BlockWeight, ExpertBlocks
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.weight_files import GGUFSummary, GGUFTensor
from tokenmill.kernels.cpu.quantized import BLOCKS

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IN_CONFIG = {"rope_freqs.weight"}
"""Tensors that became part of the config (gguf_cache.py)."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""Those of a mixture's, gate and up apart. `_join_experts` brings them together, as transformers holds them."""
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


LFM2 = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv": "conv.conv",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}


@dataclass(frozen=True, slots=True)
class Family:
    """How the tensors of an architecture differ from a checkpoint's."""

    names: Mapping[str, str]
    """What is called otherwise than in `NAMES`."""
    turned: bool = False
    """Rows of q and k lie in the order of a RoPE that turns neighbouring pairs, not halves of a head."""
    norm_offset: float = 0.0
    """What the converter added to norms' weights."""


FAMILIES = {
    "llama": Family({}, turned=True),
    "qwen2": Family({}),
    "qwen3": Family({}),
    "qwen2moe": Family(EXPERTS),
    "qwen3moe": Family(EXPERTS),
    "phi3": Family({"ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": Family({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
    "gemma2": Family(SANDWICH, norm_offset=1.0),
    "gemma3": Family(SANDWICH, norm_offset=1.0),
    "lfm2": Family(LFM2),
}
"""By `general.architecture`. llama also is mistral."""


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
        if tensor.name in IN_CONFIG:
            continue
        weight = _read(mapped, tensor, dtype, family)
        if family.turned and (heads := _turned_heads(tensor.name, config)):
            weight = _turn_back(weight, heads)
        found[checkpoint_name(tensor.name, family)] = weight
    _join_experts(found)
    return found


def _join_experts(found: dict[str, Tensor | Blocks]) -> None:
    """Put `….experts.gate_up_proj` and `….experts.down_proj` in the place of the three that a file has."""
    for name in [name for name in found if name.endswith(".experts.gate_proj.weight")]:
        stem = name.removesuffix("gate_proj.weight")
        gate, up, down = (found.pop(f"{stem}{part}_proj.weight", None) for part in ("gate", "up", "down"))
        if isinstance(gate, Tensor) and isinstance(up, Tensor):
            found[f"{stem}gate_up_proj"] = torch.cat([gate, up], dim=1)
        elif isinstance(gate, ExpertBlocks) and isinstance(up, ExpertBlocks) and gate.kind == up.kind:
            found[f"{stem}gate_up_proj"] = replace(gate, tensors=(*gate.tensors, *up.tensors))
        else:
            raise LoadError(
                f"quantization gguf: {name} and its up_proj aren't of one type; leave quantization out"
            )
        if down is not None:
            found[f"{stem}down_proj"] = down


def read_values(file: Path, summary: GGUFSummary, name: str) -> Tensor | None:
    """A plain tensor of the file in float32, None where there is none of this name."""
    tensor = next((x for x in summary.tensors if x.name == name and x.kind in PLAIN), None)
    if tensor is None:
        return None
    data = torch.from_numpy(np.fromfile(file, np.uint8, tensor.bytes, offset=tensor.begin))
    return data.view(PLAIN[tensor.kind]).view(tensor.shape).float()


def checkpoint_name(name: str, family: Family) -> str:
    """A tensor's name in a transformers checkpoint; raises LoadError for one that has none."""
    parts = name.split(".")
    within = parts[0] == "blk"
    stem, suffix = ".".join(parts[2 if within else 0 : -1]), parts[-1]
    known = {**NAMES, **family.names}.get(stem)
    if known is None or suffix not in ("weight", "bias") or within == known.startswith(("model.", "lm_head")):
        raise LoadError(
            f"quantization gguf: the file holds {name:.60}, which isn't understood; leave quantization out"
        )
    return f"model.layers.{parts[1]}.{known}.{suffix}" if within else f"{known}.{suffix}"


def _read(mapped: Tensor, tensor: GGUFTensor, dtype: torch.dtype, family: Family) -> Tensor | Blocks:
    data = mapped[tensor.begin : tensor.begin + tensor.bytes]
    if tensor.kind not in PLAIN and len(tensor.shape) == 3:
        return ExpertBlocks((data.view(*tensor.shape[:2], -1),), tensor.kind, dtype)
    if tensor.kind not in PLAIN:
        return BlockWeight(data.view(tensor.shape[0], -1), tensor.kind, dtype)
    values = data.view(PLAIN[tensor.kind]).view(tensor.shape)
    if tensor.name.endswith("ffn_gate_inp_shexp.weight"):
        values = values.view(1, -1)  # a matrix of one row, which the converter wrote as a vector
    if tensor.name.endswith("shortconv.conv.weight"):
        values = values.unsqueeze(1)  # each channel is convolved by itself
    if tensor.name.endswith("norm.weight") and family.norm_offset:
        values = values.float() - family.norm_offset
    return values.to(dtype)


def _turned_heads(name: str, config: Any) -> int:
    """How many heads' rows a query or key tensor holds; 0 for other tensors."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0


def _turn_back(weight: Tensor | Blocks, heads: int) -> Tensor | Blocks:
    """Rows (first, second, first, …) of each head as (first …, second …), the way that transformers pairs them."""
    rows = torch.arange(weight.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    if isinstance(weight, BlockWeight):
        return BlockWeight(weight.blocks[rows], weight.kind, weight.dtype)
    assert isinstance(weight, Tensor)
    return weight[rows]

"""Rotary embeddings that change with the batch, made to stay as they are.

`longrope` picks its short or long factors, and `dynamic` its base, by the longest position of the batch at
hand. In a shared cache keys of different steps meet, so they must be turned by one and the same table: the
one for the longest context that this engine serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def context_limit(config: Any) -> int | None:
    """Tokens that a text config says its model can hold; None when it doesn't say.

    YaRN stretches a trained length, which some configs keep as `max_position_embeddings`.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        limit = None
    for parameters in _parameters(config):
        trained, factor = parameters.get("original_max_position_embeddings"), parameters.get("factor")
        if parameters.get("rope_type") == "yarn" and trained and factor:
            limit = max(limit or 0, int(trained * factor))
    return limit


def stretched_limit(config: Any) -> int | None:
    """Like `context_limit`, with what `dynamic` scaling adds when it is pinned for a longer context."""
    limit = context_limit(config)
    for parameters in _parameters(config):
        if limit and parameters.get("rope_type") == "dynamic":
            limit = int(limit * max(1.0, parameters.get("factor") or 1.0))
    return limit


def pin_rope(module: nn.Module, max_context: int) -> None:
    """Fix every batch-dependent rotary table below `module` for `max_context` tokens."""
    for part in module.modules():
        if hasattr(part, "rope_type"):
            _pin(part, max_context)


def _pin(part: Any, max_context: int) -> None:
    kinds = part.rope_type
    if isinstance(kinds, str):
        if _varies(kinds):
            _set_table(part, kinds, None, max_context)
            part.rope_type = "default"
        return
    for layer_type, kind in kinds.items():
        if _varies(kind):
            _set_table(part, kind, layer_type, max_context)
            part.rope_type = {**part.rope_type, layer_type: "default"}


def _varies(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _set_table(part: Any, kind: str, layer_type: str | None, max_context: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    table = getattr(part, f"{prefix}inv_freq")
    options = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
        part.config, table.device, seq_len=max_context, **options
    )
    with torch.no_grad():
        table.copy_(frequencies)
    setattr(part, f"{prefix}attention_scaling", scaling)


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config, one set or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in found.values() if isinstance(x, dict)]
    return nested or [found]

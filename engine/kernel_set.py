"""Which kernels a device gets. Every set has the functions of `kernels/reference.py`, with its signatures."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class KernelSet(Protocol):
    """The functions that the engine calls; shapes and meaning stand in `kernels/reference.py`."""

    def store_kv(self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None: ...

    def paged_attention(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def copy_blocks(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None: ...

    def apply_logit_bias(self, logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None: ...

    def apply_penalties(self, *args: Any) -> None: ...

    def sample(self, *args: Any) -> Tensor: ...

    def token_logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]: ...


def select_kernels(device: torch.device) -> KernelSet:
    """The fastest kernels that work on `device`."""
    from tokenmill.kernels import reference

    return _as_set(reference)


def _as_set(module: ModuleType) -> KernelSet:
    return cast(KernelSet, module)

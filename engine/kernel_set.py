"""Which kernels a device gets: one object with the functions of `kernels/reference.py`, and its own products.

    cuda   Triton (kernels/gpu)
    cpu    C++ (kernels/cpu) for what it has and the dtype takes; plain torch where no library can be built
"""

from __future__ import annotations

from collections.abc import Callable


import torch
from torch import Tensor

from tokenmill.kernels import reference

Product = Callable[[Tensor, Tensor | None], Tensor]
"""x [T, in], residual [T, out] or None → x @ weight.T (+ bias) (+ residual): [T, out]."""
Lookup = Callable[[Tensor], Tensor]
"""ids [T] int64 → rows [T, hidden] of the embedding."""


class ReferenceKernels:
    """Plain torch on any device; the base of the faster sets, which replace what they do better."""

    name = "torch"

    store_kv = staticmethod(reference.store_kv)
    paged_attention = staticmethod(reference.paged_attention)
    copy_blocks = staticmethod(reference.copy_blocks)
    rope_store = staticmethod(reference.rope_store)
    rms_norm = staticmethod(reference.rms_norm)
    layer_norm = staticmethod(reference.layer_norm)
    activate = staticmethod(reference.activate)
    apply_logit_bias = staticmethod(reference.apply_logit_bias)
    apply_penalties = staticmethod(reference.apply_penalties)
    apply_bitmask = staticmethod(reference.apply_bitmask)
    sample: Callable[..., Tensor] = staticmethod(reference.sample)
    token_logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(reference.token_logprobs)

    def make_linear(self, weights: list[Tensor], biases: list[Tensor | None], gate: str | None) -> Product:
        """One product over the rows of all `weights`; `gate`: they are gate and up rows, act(gate) * up results."""
        weight, bias = join(weights), join_biases(weights, biases)
        if gate is None:
            return lambda x, residual: reference.linear(x, weight, bias, residual)
        activation = gate

        def gated(x: Tensor, residual: Tensor | None) -> Tensor:
            out = reference.activation_mul(reference.linear(x, weight, bias), activation)
            return out if residual is None else residual + out

        return gated

    def own_threads(self) -> None:
        """A whole forward pass runs on these kernels now: libraries that would compete with their threads yield."""

    def make_embedding(self, weight: Tensor, head: Product | None) -> Lookup:
        """Look-up of rows; `head` is the product over the same weight where the two are tied."""
        return lambda ids: weight[ids]


def join(weights: list[Tensor]) -> Tensor:
    """One weight of all rows."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def join_biases(weights: list[Tensor], biases: list[Tensor | None]) -> Tensor | None:
    """One bias of all rows, zeros where a part has none; None if none has."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    )


class CpuKernels(ReferenceKernels):
    """The C++ kernels, for bfloat16 and float32."""

    name = "cpu"

    def __init__(self) -> None:
        from tokenmill.kernels.cpu import attention, elementwise, linear, sampling

        self._attention, self._linear, self._sampling = attention, linear, sampling
        for module in (elementwise, sampling):
            for function in ("rope_store", "rms_norm", "layer_norm", "activate", "apply_penalties", "apply_bitmask"):
                if hasattr(module, function):
                    setattr(self, function, getattr(module, function))
        self.sample = sampling.sample
        self.token_logprobs = sampling.token_logprobs

    def paged_attention(self, query: Tensor, *args: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return self._attention.paged_attention(query.contiguous(), *args, **options)

    def own_threads(self) -> None:
        """torch's small operations run in the calling thread: a second pool of spinning threads costs more."""
        torch.set_num_threads(1)

    def make_linear(self, weights: list[Tensor], biases: list[Tensor | None], gate: str | None) -> Product:
        return self._linear.PackedLinear(join(weights), join_biases(weights, biases), gate)

    def make_embedding(self, weight: Tensor, head: Product | None) -> Lookup:
        if isinstance(head, self._linear.PackedLinear):
            packed, dtype = head, weight.dtype
            return lambda ids: packed.rows(ids, dtype)
        return super().make_embedding(weight, head)


def select_kernels(device: torch.device, dtype: torch.dtype) -> ReferenceKernels:
    """The fastest kernels that work on `device` with `dtype`."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        from tokenmill.kernels.cpu.library import current

        if current() is not None:
            return CpuKernels()
    return ReferenceKernels()

"""A mixture of experts: the choice of each token's experts, and their weighted sum, in C++ (src/mixture.cpp).

Every expert is two packed products of its own, so a token's result is the same bits whoever shares its experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from tokenmill.kernels.cpu.library import check, required, type_of
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.reference import Routing

MOST_EXPERTS = 1024


class RoutingStruct(ctypes.Structure):
    """`Routing` of src/mixture.h."""

    _fields_ = (
        *((name, c_int64) for name in ("experts", "top", "groups", "top_groups")),
        ("bias", c_void_p),
        ("gains", c_void_p),
        ("scale", c_float),
        ("sigmoid", c_int32),
        ("renormalize", c_int32),
    )


class MixtureStruct(ctypes.Structure):
    """`Mixture` of src/mixture.h."""

    _fields_ = (("ups", c_void_p), ("downs", c_void_p), ("experts", c_int64))


class Chooser:
    """`Routing` over `experts` experts, as the kernels take it."""

    def __init__(self, routing: Routing, experts: int) -> None:
        if not 1 <= routing.top <= experts <= MOST_EXPERTS:
            raise ValueError(f"can't choose {routing.top} of {experts} experts, at most {MOST_EXPERTS}")
        if experts % routing.groups or not 1 <= routing.top_groups <= routing.groups:
            raise ValueError(
                f"can't choose {routing.top_groups} of {routing.groups} groups of {experts} experts"
            )
        if routing.top > experts // routing.groups * routing.top_groups:
            raise ValueError(f"{routing.top_groups} groups don't hold {routing.top} experts")
        self.top, self.experts = routing.top, experts
        self._bias, self._gains = (
            None if part is None else part.float().contiguous() for part in (routing.bias, routing.gains)
        )
        for name, part in (("bias", self._bias), ("gains", self._gains)):
            if part is not None:
                check(part, name, (experts,))
        self.struct = RoutingStruct(
            *(experts, routing.top, routing.groups, routing.top_groups),
            *(None if part is None else part.data_ptr() for part in (self._bias, self._gains)),
            routing.scale,
            *(routing.scoring == "sigmoid", routing.renormalize),
        )

    @property
    def address(self) -> int:
        """Where its `Routing` structure lies, for as long as this object lives."""
        return ctypes.addressof(self.struct)

    def __call__(self, logits: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `reference.route`, for float32 logits [T, X]."""
        tokens = logits.shape[0]
        check(logits, "logits", (tokens, self.experts), torch.float32)
        if slots is not None:
            check(slots, "slots", (tokens,), torch.int64)
        ids = torch.empty(tokens, self.top, dtype=torch.int32)
        weights = torch.empty(tokens, self.top, dtype=torch.float32)
        required().tm_route(
            *(self.address, logits.data_ptr(), None if slots is None else slots.data_ptr()),
            *(tokens, ids.data_ptr(), weights.data_ptr()),
        )
        return ids, weights


class PackedMixture:
    """Experts as packed products: `ups` with a gate [in → I], `downs` [I → out], all of one shape and format."""

    def __init__(self, ups: Sequence[PackedLinear], downs: Sequence[PackedLinear]) -> None:
        if not 1 <= len(ups) == len(downs) <= MOST_EXPERTS:
            raise ValueError(f"{len(ups)} first and {len(downs)} second products aren't a mixture's")
        for parts in (ups, downs):
            if len({_shape(part) for part in parts}) != 1:
                raise ValueError("experts of one mixture must have one shape and format")
        if ups[0].out_features != downs[0].in_features:
            raise ValueError(f"{ups[0].out_features} hidden values don't go into {downs[0].in_features}")
        self._held = [*ups, *downs]
        self.in_features, self.out_features = ups[0].in_features, downs[0].out_features
        self._ups, self._downs = (
            (c_void_p * len(parts))(*(part.address for part in parts)) for parts in (ups, downs)
        )
        self.struct = MixtureStruct(ctypes.addressof(self._ups), ctypes.addressof(self._downs), len(ups))

    @property
    def address(self) -> int:
        """Where its `Mixture` structure lies, for as long as this object lives."""
        return ctypes.addressof(self.struct)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """sum over k of weights[t, k] * expert(ids[t, k], x[t]), plus `residual`: x [T, in] → [T, out].

        `ids` [T, k] int32 (-1: none), `weights` [T, k] float32. A token's experts are added up in its own order.
        """
        tokens, top = ids.shape
        check(x, "x", (tokens, self.in_features))
        check(ids, "ids", (tokens, top), torch.int32)
        check(weights, "weights", (tokens, top), torch.float32)
        out = torch.empty(tokens, self.out_features, dtype=x.dtype)
        if residual is not None:
            check(residual, "residual", tuple(out.shape), x.dtype)
        required().tm_mixture(
            *(self.address, x.data_ptr(), type_of(x), tokens, ids.data_ptr(), weights.data_ptr(), top),
            *(None if residual is None else residual.data_ptr(), out.data_ptr()),
        )
        return out


def _shape(part: PackedLinear) -> tuple[object, ...]:
    struct = part.struct
    quantized = part.quantized
    form = (struct.format, struct.group, struct.zero_point, struct.minima, struct.unit) if quantized else ()
    return part.in_features, part.out_features, struct.activation, quantized, form

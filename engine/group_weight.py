"""Weights that stay as a safetensors checkpoint packs them: read from the mapped files when a product wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tokenmill.kernels.groups import Groups, Kind


@dataclass(frozen=True, slots=True)
class GroupWeight:
    """A weight [out, in] in groups of inputs, whose tensors lie in files."""

    kind: Kind
    shape: tuple[int, ...]
    """Outputs and inputs."""
    dtype: torch.dtype
    """What its values are in when they are asked for, and what activations are."""
    tensors: tuple[Tensor, ...]
    """What the files hold of it."""
    read: Callable[[], Groups]
    """Its groups, on the model's device. Raises LoadError where the tensors don't fit together."""

    def values(self) -> Tensor:
        """The weight [out, in] in full."""
        return self.read().values().to(self.dtype)

    def parameter(self) -> Tensor:
        """As the model has it."""
        return self.values()


@dataclass(frozen=True, slots=True)
class GroupExperts:
    """The weights [X, out, in] of a layer's experts, all of one kind."""

    kind: Kind
    shape: tuple[int, ...]
    """Experts, outputs and inputs."""
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]
    read: Callable[[int], Groups]
    """An expert's groups, on the model's device."""
    turned: bool = False
    """Whether the model's own parameter is [X, in, out]."""

    @classmethod
    def gathered(cls, parts: Sequence[Sequence[GroupWeight]]) -> Self:
        """Of experts that lie apart, each the rows of several weights: gate, then up."""
        first, kinds = parts[0], {part.kind for expert in parts for part in expert}
        sizes = {tuple(part.shape for part in expert) for expert in parts}
        inputs = {part.shape[1] for part in first}
        if len(kinds) != 1 or len(sizes) != 1 or len(inputs) != 1:
            raise ValueError("experts of several kinds or sizes")
        rows = sum(part.shape[0] for part in first)
        tensors = tuple(tensor for expert in parts for part in expert for tensor in part.tensors)

        def read(expert: int) -> Groups:
            return concatenated([part.read() for part in parts[expert]])

        return cls(first[0].kind, (len(parts), rows, *inputs), first[0].dtype, tensors, read)

    def with_rows(self, order: Tensor) -> Self:
        """The rows `order` of each expert."""

        def read(expert: int) -> Groups:
            return taken(self.read(expert), order)

        return replace(self, read=read)

    def __len__(self) -> int:
        return self.shape[0]

    def groups(self) -> list[Groups]:
        """All experts', in one form."""
        return alike([self.read(expert) for expert in range(len(self))])

    def values(self) -> Tensor:
        """The weights [X, out, in] in full."""
        return torch.stack([self.read(expert).values().to(self.dtype) for expert in range(len(self))])

    def parameter(self) -> Tensor:
        """The weights as the model has them."""
        return self.values().mT.contiguous() if self.turned else self.values()


def alike(parts: Sequence[Groups]) -> list[Groups]:
    """Groups of one kind, all with minima or none. Raises ValueError where they can't be."""
    if len({(part.kind, part.group) for part in parts}) != 1:
        raise ValueError("weights of several kinds or groups")
    if all(part.minimum is None for part in parts):
        return list(parts)
    zero = -8.0 if parts[0].kind == "int4" else 0.0
    return [part if part.minimum is not None else replace(part, minimum=part.scale * zero) for part in parts]


def concatenated(parts: Sequence[Groups]) -> Groups:
    """One weight of all rows. Raises ValueError where no one form holds them."""
    if len(parts) == 1:
        return parts[0]
    return _joined(alike(parts), lambda tensors: torch.cat(tensors, dim=-2))


def stacked(parts: Sequence[Groups]) -> Groups:
    """Experts [X, out, in] of groups of one form."""
    return _joined(parts, torch.stack)


def _joined(parts: Sequence[Groups], join: Callable[[list[Tensor]], Tensor]) -> Groups:
    minima = [part.minimum for part in parts if part.minimum is not None]
    return replace(
        parts[0],
        codes=join([part.codes for part in parts]),
        scale=join([part.scale for part in parts]),
        minimum=join(minima) if minima else None,
    )


def taken(groups: Groups, rows: Tensor) -> Groups:
    """Some rows of a weight."""
    minimum = None if groups.minimum is None else groups.minimum[rows]
    return replace(groups, codes=groups.codes[rows], scale=groups.scale[rows], minimum=minimum)


def joined_groups(weights: Sequence[object]) -> Groups | None:
    """One weight of all rows where all of `weights` stay packed and one form holds them."""
    held = [weight for weight in weights if isinstance(weight, GroupWeight)]
    if len(held) != len(weights):
        return None
    try:
        return concatenated([weight.read() for weight in held])
    except ValueError:
        return None

"""Weights as other checkpoints pack them: integers or small floats, with a scale for each group of inputs.

int4   0 .. 15 two in a byte, the earlier input low:  scale * q + minimum,  or scale * (q - 8) without minima
fp4    e2m1 floats, packed alike:                     scale * q
int8   one in a byte:                                 scale * q + minimum,  or scale * q
fp8    e4m3 floats:                                   scale * q
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int4", "fp4", "int8", "fp8"]
FLOATS4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a 4-bit float stand for; the fourth is the sign."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight [..., out, in]; what comes before the outputs, if anything does, are experts."""

    kind: Kind
    codes: Tensor  # int4, fp4: [..., out, in / 2] uint8; int8, fp8: [..., out, in]
    scale: Tensor  # [..., out, groups] float32
    minimum: Tensor | None  # the same
    group: int
    """Inputs of a group; the last one may have fewer."""

    @property
    def inputs(self) -> int:
        return self.codes.shape[-1] * (2 if self.kind in ("int4", "fp4") else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in]"""
        return *self.codes.shape[:-1], self.inputs

    def values(self) -> Tensor:
        """The weight [..., out, in] in float32."""
        if self.kind == "fp4":
            table = torch.tensor([*FLOATS4, *(-x for x in FLOATS4)], device=self.codes.device)
            wide = table[nibbles(self.codes).int()]
        elif self.kind == "int4":
            wide = nibbles(self.codes).float()
            if self.minimum is None:
                wide -= 8
        else:
            wide = self.codes.float()
        wide *= self._by_input(self.scale)
        return wide if self.minimum is None else wide.add_(self._by_input(self.minimum))

    def _by_input(self, each: Tensor) -> Tensor:
        if each.shape[-1] == 1:
            return each
        return each.repeat_interleave(self.group, -1)[..., : self.inputs]


def nibbles(codes: Tensor) -> Tensor:
    """The 4 bits [..., 2 * n] of bytes [..., n], the lower ones first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)

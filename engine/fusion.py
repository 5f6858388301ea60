"""Sibling linears, which read the same tensor, become one matrix product (q, k and v; gate and up).

    x ─▶ q_proj      first sibling called with x:  y = x · [Wq; Wk; Wv]ᵀ, kept aside
    x ─▶ k_proj      each sibling returns its slice of y
    x ─▶ v_proj      the last one forgets y

Which linears are siblings is seen in one forward, so no model is known by name. The weights exist once: each
sibling's `weight` is a view of the group's. A sibling that is called with another tensor than the one at hand
starts anew, so a group is right in whatever order and however often its members are called.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenmill.engine import attention
from tokenmill.engine.block_weight import join_biases


class LinearGroup:
    """The joined weight [sum of outputs, inputs] of some linears, and their joint output while in use."""

    def __init__(self, members: list[nn.Linear]) -> None:
        self.widths = [x.out_features for x in members]
        self.weight = torch.cat([x.weight.detach() for x in members])
        biases = [None if x.bias is None else x.bias.detach() for x in members]
        self.bias = join_biases([x.weight for x in members], biases)
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, index: int, x: Tensor) -> Tensor:
        """Member `index`'s output for x [..., inputs]: a slice of the joint output."""
        if self._input is not x or self._parts[index] is None:
            joint = functional.linear(x, self.weight, self.bias)
            self._input, self._parts = x, list(torch.split(joint, self.widths, dim=-1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(x is not None for x in self._parts):
            self._input, self._parts = None, []
        return part


class SiblingLinear(nn.Linear):
    """One member of a `LinearGroup`, in the place of the linear that it was."""

    def __init__(self, original: nn.Linear, group: LinearGroup, index: int) -> None:
        super().__init__(
            original.in_features, original.out_features, original.bias is not None, device="meta"
        )
        rows = slice(sum(group.widths[:index]), sum(group.widths[: index + 1]))
        self.weight = nn.Parameter(group.weight[rows], requires_grad=False)
        if original.bias is not None and group.bias is not None:
            self.bias = nn.Parameter(group.bias[rows], requires_grad=False)
        self.group = group
        self.index = index

    def forward(self, input: Tensor) -> Tensor:
        return self.group.part(self.index, input)


@dataclass(slots=True)
class _Calls:
    """Which linears a forward called on which tensor. The tensors are held, so that no id is used twice."""

    seen: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def hook(self, name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.seen.append((name, inputs[0], inputs[0]._version))

        return note

    def groups(self) -> list[list[str]]:
        """Names that read one tensor, unchanged in between; a linear that was called twice is in none."""
        calls = Counter(name for name, _, _ in self.seen)
        groups: dict[tuple[int, int], list[str]] = {}
        for name, tensor, changes in self.seen:
            if calls[name] == 1:
                groups.setdefault((id(tensor), changes), []).append(name)
        return [names for names in groups.values() if len(names) > 1]


class _NoCache(attention.LayerRecorder):
    """Lets a forward run without a cache and leaves no mark on the layers."""

    def record(self, *_: object) -> None:
        return


def fuse_siblings(module: nn.Module) -> int:
    """Fuse what one forward of one token shows to be siblings, in place; returns the number of groups.

    At any time one group's weights exist twice at the most.
    """
    linears = _plain_linears(module)
    calls = _Calls()
    hooks = [x.register_forward_pre_hook(calls.hook(name)) for name, x in linears.items()]
    device = next(module.parameters()).device
    try:
        with torch.no_grad():
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            attention.forward(module, zero, zero, _NoCache())
    finally:
        for hook in hooks:
            hook.remove()
    groups = [alike for names in calls.groups() for alike in _split_by_type(names, linears)]
    for names in groups:
        _join(module, names, [linears.pop(name) for name in names])
    return len(groups)


def _plain_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Linears that are nothing but that: no subclass, hook or patch, in one place, sharing no weight."""
    places = Counter(id(x) for _, x in module.named_modules(remove_duplicate=False))
    owners = Counter(id(x) for part in module.modules() for x in part._parameters.values() if x is not None)
    return {
        name: x
        for name, x in module.named_modules()
        if type(x) is nn.Linear
        and name
        and places[id(x)] == 1
        and all(owners[id(p)] == 1 for p in x.parameters())
        and x.weight.is_floating_point()
        and not (x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x))
    }


def _split_by_type(names: list[str], linears: dict[str, nn.Linear]) -> list[list[str]]:
    """Siblings whose weights can be concatenated: one dtype, one device."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name in names:
        weight = linears[name].weight
        alike.setdefault((weight.dtype, weight.device), []).append(name)
    return [x for x in alike.values() if len(x) > 1]


def _join(module: nn.Module, names: list[str], members: list[nn.Linear]) -> None:
    """Put a group's siblings in the places of `members`, whose own weights are dropped."""
    group = LinearGroup(members)
    for index, (name, member) in enumerate(zip(names, members, strict=True)):
        parent, _, own = name.rpartition(".")
        sibling = SiblingLinear(member, group, index).train(member.training)
        setattr(module.get_submodule(parent), own, sibling)

"""One copy to the device before a step, one copy back after it, and nothing that waits in between.

    host    arrays ─▶ one pinned buffer ──copy──▶ device: one buffer, each array a view of it
    device  results ─▶ one buffer ──copy──▶ pinned ─▶ event          `wait()` reads it once the event has passed

On a CPU arrays and tensors share their memory; only results are copied, since a next step may overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
LINES = 4
"""Pinned buffers in turn: one may be written while copies of the last ones are still to run."""


class PinnedLines:
    """Host buffers used in turn; each waits until its last copy has run before it is written again."""

    def __init__(self, device: torch.device, size: int = 0) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [self._make(size) for _ in range(LINES)]
        self._events: list[Any] = [None] * LINES
        self._next = 0

    def _make(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def take(self, size: int) -> Tensor:
        """The next buffer [at least `size`] uint8, free to be written; grown where it is too small."""
        at = self._next
        if self._events[at] is not None:
            self._events[at].synchronize()
        if self._buffers[at].numel() < size:
            self._buffers[at] = self._make(max(size, 2 * self._buffers[at].numel()))
        return self._buffers[at]

    def send(self, target: Tensor) -> None:
        """Copy the buffer just taken to `target` [n] uint8 on the device, without waiting."""
        at = self._next
        target.copy_(self._buffers[at][: target.numel()], non_blocking=True)
        if self._on_gpu:
            self._events[at] = _recorded(self._events[at])
        self._next = (at + 1) % LINES


@dataclass(slots=True)
class Fetched:
    """Tensors on their way to the host."""

    tensors: list[Tensor]
    event: Any = None
    keep: list[Tensor] = field(default_factory=list)
    """What the copy reads, held until it has run."""

    def wait(self) -> list[NDArray[Any]]:
        """Their values, once they are here."""
        if self.event is not None:
            self.event.synchronize()
        self.keep.clear()
        return [tensor.numpy() for tensor in self.tensors]


class Staging:
    """The copies of one engine."""

    def __init__(self, device: torch.device, *, packed: bool | None = None) -> None:
        """`packed`: pack and copy, as for a GPU; None: where the device is one."""
        self._device = device
        self._packed = device.type == "cuda" if packed is None else packed
        self._lines = PinnedLines(device)

    def put(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays as tensors on the device, all by one copy."""
        if not self._packed:
            return [torch.from_numpy(array) for array in arrays]
        places, total = _places([array.nbytes for array in arrays])
        if not total:
            return [torch.from_numpy(array).to(self._device) for array in arrays]
        host = self._lines.take(total).numpy()
        for array, at in zip(arrays, places, strict=True):
            host[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = torch.empty(total, dtype=torch.uint8, device=self._device)
        self._lines.send(target)
        return [_view(target, at, torch.from_numpy(array)) for array, at in zip(arrays, places, strict=True)]

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Start to copy the tensors to the host; those of one step go together."""
        if not self._packed:
            return Fetched([tensor.clone() for tensor in tensors])
        tensors = [tensor.contiguous() for tensor in tensors]
        places, total = _places([tensor.nbytes for tensor in tensors])
        if len(tensors) == 1:
            source = tensors[0].reshape(-1).view(torch.uint8)
        else:
            source = torch.empty(total, dtype=torch.uint8, device=self._device)
            parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
            gaps = [at - end for at, end in zip(places[1:], _ends(places, parts), strict=False)]
            padding = [source.new_empty(gap) for gap in [*gaps, 0]]
            joined = [piece for pair in zip(parts, padding, strict=True) for piece in pair if piece.numel()]
            source = torch.cat(joined) if joined else source
        on_gpu = self._device.type == "cuda"
        host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=on_gpu)
        host.copy_(source, non_blocking=True)
        event = _recorded(None) if on_gpu else None
        return Fetched(
            [_view(host, at, tensor) for at, tensor in zip(places, tensors, strict=True)], event, [source]
        )


def _recorded(event: Any) -> Any:
    """An event (a new one for None) that passes when what the device has been asked so far is done."""
    make: Any = torch.cuda.Event
    event = make() if event is None else event
    event.record()
    return event


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Aligned offsets of parts of `sizes` bytes, and the end of the last one."""
    places, end = [], 0
    for size in sizes:
        at = -(-end // ALIGNMENT) * ALIGNMENT
        places.append(at)
        end = at + size
    return places, end


def _ends(places: Sequence[int], parts: Sequence[Tensor]) -> list[int]:
    return [at + part.numel() for at, part in zip(places, parts, strict=True)]


def _view(buffer: Tensor, at: int, like: Tensor) -> Tensor:
    """The part of a buffer [n] uint8 at `at` as a tensor of `like`'s type and shape."""
    return buffer[at : at + like.nbytes].view(like.dtype).view(like.shape)

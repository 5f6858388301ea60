"""Memory for what kernels stream through: aligned to cache lines, in huge pages where the system has them.

With pages of 4 KiB every few rows cost a walk through the page tables, and the processor's prefetching stops at each
border. Pages are the system's zeros until they are written: they take neither time nor memory before that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

LINE = 64
CHUNK = 32 * 2**20
POPULATE_WRITE = 23
"""Of Linux's madvise: make the pages as a write would, and leave what they hold."""


def zeros(size: int) -> Tensor:
    """`size` zero bytes [size] uint8 that begin at a page."""
    if size == 0:
        return torch.zeros(0, dtype=torch.uint8)
    if hasattr(mmap, "MAP_PRIVATE"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel that was built without them
            return torch.frombuffer(pages, dtype=torch.uint8)
    return torch.frombuffer(pages, dtype=torch.uint8)


def touch(memory: Tensor, start: int, size: int) -> bool:
    """Have the system provide bytes [start, start + size) of memory that `zeros` made, before anybody needs them.

    A page that is written for the first time costs up to milliseconds where the machine is a virtual one. What is
    there stays. False where the system can't do it.
    """
    if sys.platform != "linux":
        return False
    first = (memory.data_ptr() + start) // mmap.PAGESIZE * mmap.PAGESIZE
    last = memory.data_ptr() + min(start + size, memory.numel() * memory.element_size())
    length = ctypes.c_size_t(max(0, last - first))
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, POPULATE_WRITE) == 0)


class Arena:
    """Hands out pieces of large chunks, so that small weights share huge pages too.

    A chunk lives as long as any piece of it.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Zero bytes [size] uint8, aligned to a cache line."""
        if size > CHUNK // 4:
            return zeros(size)
        if self._used + size > len(self._chunk):
            self._chunk, self._used = zeros(CHUNK), 0
        piece = self._chunk[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return piece


arena = Arena()

"""The ranks of one model, and what they do together: NCCL between GPUs, gloo between processes of a CPU.

Every rank calls the same methods in the same order. They meet through a file that only their user may read, and
on Linux talk over the loopback interface, so nothing of theirs can be reached from outside.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another: kernels may be compiled meanwhile."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def taken() -> bool:
    """Whether this process is in a group already: torch has one of this kind a process."""
    return dist.is_initialized()


class Ranks:
    """Rank `rank` of `size`; `device` is where its tensors are."""

    def __init__(self, rank: int, size: int, device: torch.device, rendezvous: str) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._rendezvous = rendezvous
        self._met = False

    def meet(self) -> None:
        """Wait until all ranks are here."""
        if sys.platform == "linux":
            for name in INTERFACES:
                os.environ.setdefault(name, "lo")
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{self._rendezvous}",
            rank=self.rank,
            world_size=self.size,
            timeout=PATIENCE,
            device_id=self.device if on_gpu else None,
        )
        self._met = True

    def part(self) -> None:
        """Leave the group, where they met."""
        if self._met:
            self._met = False
            dist.destroy_process_group()

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in x itself."""
        dist.all_reduce(x)
        return x

    def share(self, x: Tensor) -> None:
        """Overwrite x with rank 0's."""
        dist.broadcast(x, src=0)

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' x, of one shape, in the order of ranks; on rank 0 only, elsewhere nothing."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0)
        return parts or []

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

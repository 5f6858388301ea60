"""Rank 0's side of a model that several ranks share: the other ranks' processes, from first to last.

    engine process (rank 0) ──spawns──▶ rank_host.py (rank 1, 2, …), each at the end of a socket of its own
       find, check, map the files           import
       take its part     ──────Begin─────▶  map the files, take its part
       wait for all      ◀─────Loaded─────  wait
                         ───────Meet──────▶
       └──────────── meet, profile, allocate: in step with each other from here on ────────────┘

A process whose socket closes ends itself, so none outlives rank 0. When another one ends unasked, the model is lost.
An engine process ends then, at once: who watches it starts all anew. A process that is somebody's own goes on where
it can: gloo sees the closed connection and the step raises `RanksLost`. On GPUs, it may wait on the device for a sum
that never comes, which nothing interrupts; so it ends there, too.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.parallel_forward import ParallelForward
from tokenmill.engine.rank_link import Begin, Failed, Link, Loaded, Meet, RankStep
from tokenmill.engine.ranks import Ranks, taken
from tokenmill.kernels.cpu.library import default_threads

logger = logging.getLogger("tokenmill.engine")
COMMAND: tuple[str, ...] = (sys.executable, "-m", "tokenmill.engine.rank_host")
LOST_A_RANK = 3
"""Exit code of a process that ends because another rank did."""


class Team:
    """The ranks of one model; a process has one team at a time."""

    def __init__(self, config: EngineConfig, own_process: bool = False) -> None:
        """Start the other ranks' processes, which import what they need; raises LoadError.

        `own_process`: nothing else is in this one, which ends when another rank's does.
        """
        if taken():
            raise LoadError(
                f"{config.source}: this process has a model with tensor_parallel already; close that first"
            )
        self._configs = configs_of_ranks(config)
        self._source = config.source
        self._ends = own_process or self.config.device != "cpu"
        self._in_turn = False
        self._closing = threading.Event()
        self._links: list[Link] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._folder = folder = Path(tempfile.mkdtemp(prefix="tokenmill-ranks-"))
        self._rendezvous = str(folder / "rendezvous")
        self._ranks = Ranks(0, config.tensor_parallel, torch.device(self.config.device), self._rendezvous)
        self._finalizer = weakref.finalize(
            self, _end, self._closing, self._ranks, self._links, self._children, folder
        )
        try:
            for _ in self._configs[1:]:
                self._start()
        except OSError as error:
            self.close()
            raise LoadError(f"{config.source}: another rank's process can't be started ({error})") from None

    @property
    def config(self) -> EngineConfig:
        """Rank 0's own: with its device."""
        return self._configs[0]

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._links.append(Link(ours))
        with theirs:
            child = subprocess.Popen(
                [*COMMAND, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._children.append(child)

    @torch.no_grad()
    def build_forward(
        self, model: LoadedModel, config: EngineConfig, kernels: ReferenceKernels
    ) -> ParallelForward:
        """Rank 0's forward pass. Takes the model's weights over; returns when every rank has its part.

        Only now do the others load: what loading leaves in caches (a download, a converted file, a verdict) is there.
        Weights that are converted as they are read take the whole model's size meanwhile: then the ranks take turns.
        """
        self._in_turn = model.copied
        if not self._in_turn:
            for rank in range(1, len(self._configs)):
                self._begin(rank)
        return ParallelForward(model, config, kernels, self._ranks, self._wait_for_all, self._tell)

    def _begin(self, rank: int) -> None:
        with suppress(OSError):  # a rank that is gone is noticed when it is waited for
            self._links[rank - 1].send(Begin(self._configs[rank], rank, self._rendezvous))

    def _wait_for_all(self) -> None:
        """Until each rank has loaded its part; from then on, watch them."""
        for rank, link in enumerate(self._links, 1):
            if self._in_turn:
                self._begin(rank)
            message = link.receive()
            if isinstance(message, Failed):
                raise LoadError(message.reason)
            if not isinstance(message, Loaded):
                raise LoadError(f"{self._source}: the process of rank {rank} ended while it loaded")
        self._tell(Meet())
        watch = threading.Thread(
            target=_watch,
            args=(self._closing, self._links, self._source, self._ends),
            name="ranks",
            daemon=True,
        )
        watch.start()

    def _tell(self, message: Meet | RankStep) -> None:
        for link in self._links:
            link.send(message)

    def close(self) -> None:
        """End the other ranks, and wait for their end. Done at exit, too, and when nobody uses the team any more."""
        self._finalizer()


def configs_of_ranks(config: EngineConfig) -> list[EngineConfig]:
    """What each rank is told: its device, and on a CPU its part of the threads. Raises LoadError."""
    size = config.tensor_parallel
    if config.quantization == "gguf":
        raise LoadError(
            f"{config.source}: tensor_parallel would cut through the blocks that quantization gguf keeps; "
            "say int8 or int4, or leave one of them out"
        )
    if config.deterministic is True and size > 2:
        raise LoadError(
            f"{config.source}: sums over {size} ranks have no fixed order: deterministic needs at most "
            "tensor_parallel 2"
        )
    devices = _devices(config)
    if devices[0] != "cpu":
        return [msgspec.structs.replace(config, device=device) for device in devices]
    threads = max(1, (config.threads or default_threads()) // size)
    return [msgspec.structs.replace(config, device="cpu", threads=threads)] * size


def _devices(config: EngineConfig) -> list[str]:
    size, wanted = config.tensor_parallel, config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return ["cpu"] * size
    if wanted != "cuda":
        raise LoadError(
            f"{config.source}: tensor_parallel {size} takes the first {size} GPUs, so device is cuda (or cpu), not "
            f"{wanted}; CUDA_VISIBLE_DEVICES chooses which GPUs come first"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < size:
        raise LoadError(f"{config.source}: tensor_parallel {size} needs {size} GPUs; torch sees {count}")
    return [f"cuda:{rank}" for rank in range(size)]


def _watch(closing: threading.Event, links: list[Link], source: str, ends: bool) -> None:
    """Tell when another rank's process has ended without being told to, and let this one end if it `ends`."""
    gone, _, _ = select.select(links, [], [])
    if closing.is_set():
        return
    message = gone[0].receive()
    reason = f" ({message.reason})" if isinstance(message, Failed) else ""
    logger.error("%s: rank %d has ended%s: the model is lost", source, links.index(gone[0]) + 1, reason)
    if ends:
        logging.shutdown()
        os._exit(LOST_A_RANK)


def _end(
    closing: threading.Event,
    ranks: Ranks,
    links: list[Link],
    children: list[subprocess.Popen[bytes]],
    folder: Path,
) -> None:
    """The other ranks go first: in the middle of a sum, rank 0 could wait for them in vain while it leaves."""
    closing.set()
    for link in links:
        link.shut()
    for child in children:
        child.kill()
        child.wait()
    for link in links:
        link.close()
    ranks.part()
    shutil.rmtree(folder, ignore_errors=True)

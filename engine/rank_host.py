"""The process of one rank but the first: `python -m tokenmill.engine.rank_host --fd N`.

    reader thread ──steps──▶ main thread: import, load, meet the other ranks, then follow rank 0 for ever

The process ends when the socket closes, whatever it is doing; it ends by itself only when something fails, and
says why.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

from tokenmill.engine.garbage import leave_alone
from tokenmill.engine.lean_imports import import_transformers
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.rank_link import Begin, Failed, Link, Loaded, Meet, NoRoom, RankStep

logger = logging.getLogger("tokenmill.engine")


class RankHost:
    """Joins the socket and this rank's part of the model."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._steps: queue.SimpleQueue[RankStep] = queue.SimpleQueue()
        self._all_loaded = threading.Event()

    def run(self) -> int:
        """Follow rank 0 until it is gone; returns the exit code where that isn't how it ends."""
        import_transformers()
        importlib.import_module("tokenmill.engine.parallel_forward")
        begin = self._link.receive()
        if not isinstance(begin, Begin):
            return 0
        threading.Thread(
            target=self._read, args=(Path(begin.rendezvous),), name="reader", daemon=True
        ).start()
        try:
            self._follow(begin)
        except LoadError as error:
            self._say(str(error))
        except NoRoom:  # rank 0 has it as well: closing its socket, however late, ends this process
            threading.Event().wait()
        except Exception as error:
            logger.exception("rank %d of %s failed", begin.rank, begin.config.source)
            self._say(
                f"{begin.config.source}: rank {begin.rank}: {type(error).__name__}: {first_line(error)}"
            )
        return 1

    def _follow(self, begin: Begin) -> None:
        import torch

        from tokenmill.engine.kernel_choice import configured_kernels
        from tokenmill.engine.loader import load
        from tokenmill.engine.parallel_forward import ParallelForward
        from tokenmill.engine.ranks import Ranks

        config = begin.config
        device = torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model = load(config, lambda stage, done: None)
        kernels = configured_kernels(config, model.device, model.dtype)
        kernels.reserve(config.max_batch, model.logits_width)
        ranks = Ranks(begin.rank, config.tensor_parallel, device, begin.rendezvous)
        with torch.inference_mode():
            forward = ParallelForward(model, config, kernels, ranks, self._arrive)
            leave_alone()
            while True:
                forward.follow(self._steps.get())

    def _read(self, rendezvous: Path) -> None:
        """Put each step into the queue; end the process when rank 0 is gone, which may have left its folder."""
        while isinstance(message := self._link.receive(), Meet | RankStep):
            if isinstance(message, Meet):
                self._all_loaded.set()
            else:
                self._steps.put(message)
        shutil.rmtree(rendezvous.parent, ignore_errors=True)
        os._exit(0)

    def _arrive(self) -> None:
        """Tell rank 0 that the weights are here, and wait until all ranks' are."""
        self._link.send(Loaded())
        self._all_loaded.wait()

    def _say(self, reason: str) -> None:
        try:
            self._link.send(Failed(reason))
        except OSError:
            logger.error("%s; rank 0 is gone already", reason)


def main(argv: list[str] | None = None) -> int:
    """Entry of a rank's process: `--fd` is its end of the socketpair."""
    parser = argparse.ArgumentParser(prog="tokenmill.engine.rank_host")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return RankHost(Link(socket.socket(fileno=arguments.fd))).run()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)

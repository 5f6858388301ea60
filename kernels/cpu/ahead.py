"""Compiles the CPU's library while a process does what comes before it needs it.

    main thread   import torch, transformers, read the weights │ library.current(), which waits if it has to
    compiler      ─────────────────────────────────────▶ the cache

Imports no torch. A library that is in the cache costs nothing; where none can be made, `library.current()` says so.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from tokenmill.kernels.cpu import build
from tokenmill.kernels.cpu.isa import supported, to_try

STOP_S = 2.0


class Ahead:
    """A build under way."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._build, name="compiler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave nothing behind, neither a compiler nor its files, where nobody will need the library."""
        if self._thread.is_alive():
            build.stop()
            self._thread.join(STOP_S)

    def _build(self) -> None:
        with suppress(build.BuildError, ValueError):
            build.build(to_try(supported())[0])

"""Kernels compiled ahead by processes, for a GPU that isn't there, into an empty cache.

Run as a program by test_gpu_ahead.py with TRITON_CACHE_DIR set, since Triton's interpreter can't be left again.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.offline import META, AbsentChip, compiling_for
from tokenmill.kernels.gpu.overlap import overlapping_launches
from tokenmill.kernels.reference import Routing


def few() -> None:
    """Kernels of several modules; two of them share what they call."""
    x = torch.empty(4, 512, dtype=torch.bfloat16, device=META)
    weight = torch.empty(512, dtype=torch.bfloat16, device=META)
    with overlapping_launches():
        normed = gpu.rms_norm(x, weight, 1e-5)
        gpu.activation_mul(normed, "silu")
        gpu.linear(normed, torch.empty(64, 512, dtype=torch.bfloat16, device=META))
        gpu.route(torch.empty(4, 8, device=META), Routing(2))


def compiled_by(work: Callable[[], object]) -> list[str]:
    """What `work` compiles in this process, because Triton's cache has it not."""
    found: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            found.append(src.name)

    triton.knobs.compilation.listener = listen
    with compiling_for(90):
        work()
    triton.knobs.compilation.listener = None
    return found


def broken() -> None:
    few()
    raise RuntimeError("a rehearsal that goes wrong")


def launched_elsewhere() -> bool:
    """Whether another thread's launches run while this one's are recorded."""
    runs: list[bool] = []
    run = JITFunction.run

    def seen(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        runs.append(not warmup)

    JITFunction.run = seen

    def elsewhere() -> None:
        thread = threading.Thread(target=few)
        thread.start()
        thread.join()

    try:
        gpu.compile_ahead(elsewhere, processes=3)
    finally:
        JITFunction.run = run
    return bool(runs) and all(runs)


def unsettled_keys() -> list[str]:
    """Kernels whose keys are others once those of all that they call are known."""
    modules = [importlib.import_module(f"tokenmill.kernels.gpu.{home}") for home in {*gpu._HOMES.values()}]
    kernels = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    before = {kernel: kernel.cache_key for kernel in kernels}
    names = []
    for kernel, key in before.items():
        kernel.hash, kernel.used_global_vals = None, {}
        if kernel.cache_key != key:
            names.append(kernel.__name__)
    return names


def main() -> None:
    """Print what was found; the second call starts from the cache that the first one has filled."""
    if sys.argv[1:]:
        print(json.dumps({"compiled": compiled_by(few)}))
        return
    driver.set_active(AbsentChip(90))
    cold = gpu.compile_ahead(few, processes=3)
    files = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))
    found = {
        "cold": cold,
        "files": len(files),
        "warm": gpu.compile_ahead(few, processes=3),
        "broken": gpu.compile_ahead(broken, processes=3),
        "launched_elsewhere": launched_elsewhere(),
        "unsettled_keys": unsettled_keys(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

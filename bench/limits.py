"""What the machine can do at most: how fast it reads memory and multiplies matrices, measured here and now.

Both are the best of several tries. On a CPU memory is read by all threads at once, from more than any cache
holds; on a GPU it is copied, and both directions count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenmill.bench.roofline import Limits

if TYPE_CHECKING:
    import torch

CPU_READ_BYTES = 1 << 30
GPU_COPY_BYTES = 1 << 32
CPU_MATMUL = 2048
GPU_MATMUL = 8192
TRIES = 8


def measure_limits(device: str = "cpu", dtype: str = "bfloat16", threads: int | None = None) -> Limits:
    """Limits of `device` in `dtype`, a few seconds. `threads` of the CPU; None takes torch's own number."""
    import torch

    place = torch.device(device)
    kind: torch.dtype = getattr(torch, dtype)
    if place.type == "cuda":
        return Limits(
            device=torch.cuda.get_device_name(place),
            dtype=dtype,
            read_bytes_per_s=_copy_rate(place),
            matmul_flops_per_s=_matmul_rate(place, kind, GPU_MATMUL),
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return Limits(
            device="cpu",
            dtype=dtype,
            read_bytes_per_s=_read_rate(),
            matmul_flops_per_s=_cpu_matmul_rate(kind),
            threads=torch.get_num_threads(),
        )
    finally:
        torch.set_num_threads(before)


def _read_rate() -> float:
    import torch

    memory = torch.ones(CPU_READ_BYTES // 4, dtype=torch.float32)
    # Both stream through memory in all threads; which one the CPU's prefetchers like better differs.
    ways: list[Callable[[], object]] = [memory.sum, memory.max]
    return CPU_READ_BYTES / min(_best_seconds(way) for way in ways)


def _copy_rate(device: torch.device) -> float:
    import torch

    source = torch.empty(GPU_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * GPU_COPY_BYTES / _best_seconds(lambda: target.copy_(source), device)


def _cpu_matmul_rate(dtype: torch.dtype) -> float:
    """In `dtype` or, where the CPU has no instruction for it and torch emulates one, in float32."""
    import torch

    return max(_matmul_rate(torch.device("cpu"), kind, CPU_MATMUL) for kind in {dtype, torch.float32})


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Random numbers, since a chip draws less power, and so runs faster, on zeros."""
    import torch

    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=out), device)


def _best_seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """The shortest of several runs; the first one, which warms up, never is."""
    import torch

    def settle() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    best = float("inf")
    for _ in range(TRIES + 1):
        settle()
        began = time.perf_counter()
        work()
        settle()
        best = min(best, time.perf_counter() - began)
    return best

"""Which kernels a device gets.

    cuda   Triton (kernels/gpu; engine/gpu_kernels.py)
    cpu    C++ (kernels/cpu) for what it has and the dtype takes; plain torch where no library can be built

TOKENMILL_KERNELS=torch, cpu or triton in the environment overrides the choice: to look for a fault, or to run the
Triton kernels in their interpreter.
"""

from __future__ import annotations

import logging
import os

import torch

from tokenmill.engine.config import EngineConfig, Quantization
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.kernels import gpu
from tokenmill.kernels.groups import Kind

logger = logging.getLogger("tokenmill.engine")
FP8_CAPABILITY = (8, 9)
"""From which on a GPU knows 8-bit floats."""


def _why_no_triton() -> str | None:
    """Why the Triton kernels can't run here, in one line; None if they can."""
    if not gpu.available():
        return "the GPU kernels need Triton: pip install 'tokenmill[gpu]'"
    reason: str | None = gpu.check_toolchain()
    return reason


def select_kernels(
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    quantization: Quantization | None = None,
) -> ReferenceKernels:
    """The fastest kernels that work on `device` with `dtype`.

    `deterministic`: every result stays the same to the bit in any batch, where that costs speed too.
    `quantization` of the weights is for kernels that have it among their `quantizations`; plain torch has none.
    """
    wanted = os.environ.get("TOKENMILL_KERNELS", "triton" if device.type == "cuda" else "cpu")
    if wanted == "triton":
        reason = _why_no_triton()
        if reason is None:
            from tokenmill.engine.gpu_kernels import GpuKernels

            return GpuKernels(device, dtype, deterministic=deterministic, quantization=quantization)
        logger.warning("%s; plain torch runs instead, slowly", reason)
    elif wanted == "cpu" and device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        from tokenmill.kernels.cpu.library import current

        if current() is not None:
            from tokenmill.engine.cpu_tape import TracingKernels

            return TracingKernels(quantization)
    return ReferenceKernels()


def kept_packings(config: EngineConfig, device: torch.device) -> frozenset[Kind]:
    """The kinds of packed weights that stay so, for the kernels read them: all others are unpacked at load."""
    if config.quantization is not None or not config.fused_decoder or config.tensor_parallel > 1:
        return frozenset()
    kinds = select_kernels(device, torch.bfloat16).packings
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return kinds - {"fp8"}
    return kinds


def has_cpu_kernels() -> bool:
    """Whether C++ kernels run on this CPU: they multiply bfloat16 weights at their best on every instruction set."""
    from tokenmill.kernels.cpu import library

    return os.environ.get("TOKENMILL_KERNELS", "cpu") == "cpu" and library.current() is not None


def configured_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> ReferenceKernels:
    """The kernels for `config`, with the threads that it gives them; raises LoadError where they can't do it."""
    if config.threads is not None:
        use_threads(config.threads)
    kernels = select_kernels(
        device, dtype, deterministic=config.deterministic is True, quantization=config.quantization
    )
    if config.quantization is not None and config.quantization not in kernels.quantizations:
        raise LoadError(
            f"{config.source}: the {kernels.name} kernels, which run here, have no quantization "
            f"{config.quantization}; leave it out"
        )
    return kernels


def use_threads(count: int) -> None:
    """Give the forward pass on a CPU `count` threads: torch's and, where they can be built, our kernels'."""
    from tokenmill.kernels.cpu import library

    torch.set_num_threads(count)
    if library.current() is not None:
        library.set_threads(count)

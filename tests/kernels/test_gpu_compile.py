"""Every kernel compiles for sm_90 and fits the chip, shown without one (kernels/gpu/offline.py).

One process compiles them all, since the interpreter's switch is read when the kernels are imported; for every
shape that takes minutes where nothing is cached, so `make test` is content with a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = 227 * 1024


@pytest.fixture(
    scope="module", params=[["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"]
)
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tokenmill.kernels.gpu.warmup", "--offline", *request.param]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines: list[dict[str, Any]] = json.loads(done.stdout)
    return lines


def test_every_kernel_is_there(kernels: list[dict[str, Any]]) -> None:
    expected = {
        "rms_norm_kernel", "activation_mul_kernel", "store_kernel", "rope_store_kernel", "copy_kernel",
        "plan_kernel", "decode_kernel", "tiles_kernel", "prefill_kernel", "adjust_kernel", "bias_kernel",
        "bitmask_kernel", "threshold_kernel", "keep_kernel", "choose_kernel", "logprobs_kernel",
        "linear_kernel", "quantize_rows_kernel", "fp8_linear_kernel", "route_kernel", "count_kernel",
        "lay_out_kernel", "expert_kernel", "sum_kernel", "conv_kernel", "recur_kernel", "gated_norm_kernel",
        "gate_mul_kernel", "copy_states_kernel", "norm_add_kernel", "act_mul_kernel",
    }  # fmt: skip
    assert {kernel["name"] for kernel in kernels} == expected


def test_they_fit_a_multiprocessor_without_spilling(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT, kernel
        # The threshold search trades some spilled words for a second program a multiprocessor, and a prefill over
        # heads of 512 has no registers left for a few.
        spilled = {"threshold_kernel": 160, "prefill_kernel": 64}
        assert kernel["stack"] <= spilled.get(kernel["name"], 16), kernel
        assert kernel["registers"] * 32 * kernel["warps"] <= 65536, kernel


def test_overlapping_kernels_wait_before_they_read(kernels: list[dict[str, Any]]) -> None:
    waiting = {kernel["name"] for kernel in kernels if kernel["overlap"] and kernel["waits"]}
    assert waiting >= {
        "rms_norm_kernel", "linear_kernel", "rope_store_kernel", "plan_kernel", "decode_kernel",
        "activation_mul_kernel", "store_kernel", "quantize_rows_kernel", "fp8_linear_kernel", "conv_kernel",
        "recur_kernel", "gated_norm_kernel", "gate_mul_kernel", "copy_states_kernel", "norm_add_kernel",
        "act_mul_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert not kernel["reads_before_wait"], kernel
        assert kernel["overlap"] or not kernel["waits"], kernel
        if kernel["overlap"] and kernel["name"] in ("linear_kernel", "fp8_linear_kernel"):
            assert kernel["prefetches_before_wait"], kernel


def test_a_norm_adds_up_a_row_in_one_order_wherever_it_stands(kernels: list[dict[str, Any]]) -> None:
    layouts = {
        name: [set(kernel["row_sums"]) for kernel in kernels if kernel["name"] == name and kernel["row_sums"]]
        for name in ("rms_norm_kernel", "linear_kernel")
    }
    assert len(layouts["linear_kernel"]) > 2
    for found in layouts["linear_kernel"] + layouts["rms_norm_kernel"]:
        assert found == layouts["rms_norm_kernel"][0]
        assert len(found) == 1


def test_the_matmuls_use_the_matrix_units(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["name"] in ("decode_kernel", "linear_kernel", "expert_kernel"):
            assert kernel["mma"] or kernel["wgmma"], kernel
        if kernel["name"] == "prefill_kernel":
            assert kernel["wgmma"], kernel
        if kernel["name"] == "fp8_linear_kernel":
            assert kernel["wgmma_e4m3"] == kernel["wgmma"] > 0, kernel
            assert not kernel["mma"], kernel


FLOAT32 = """
import json, torch
from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.jit import FP8
from tokenmill.kernels.gpu.offline import META, compiling_for

def product(inputs, outputs, dtype, activation):
    weight = torch.empty(outputs, inputs, dtype=dtype, device=META)
    if dtype == FP8:
        weight = gpu.QuantizedWeight(weight, torch.empty(outputs, device=META), 0)
    gpu.linear(torch.empty(20, inputs, device=META), weight, activation=activation)

with compiling_for(90) as compiled:
    product(128, 512, torch.float32, "silu")  # tiles of 16 outputs
    product(2048, 16384, torch.float32, "silu")
    product(4096, 28672, FP8, "silu")
print(json.dumps([kernel.shared for kernel in compiled]))
"""


def test_float32_rows_fit_beside_wide_weights() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", FLOAT32], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert shared
    assert max(shared) <= SHARED_LIMIT, shared


def test_steps_of_other_sizes_need_no_other_variants() -> None:
    """A kernel that is compiled for the first time in a step keeps everybody waiting for a second."""
    program = Path(__file__).with_name("gpu_variants.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "plan_kernel": 1, "decode_kernel": 1, "tiles_kernel": 1, "prefill_kernel": 1, "conv_kernel": 1,
        "recur_kernel": 1, "gated_norm_kernel": 1, "gate_mul_kernel": 1,
    }  # fmt: skip

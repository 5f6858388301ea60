"""What a captured decode step launches compiles for an H200, and nothing in it reads a number back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_decode_step_compiles_and_never_asks_the_device() -> None:
    program = Path(__file__).with_name("gpu_meta_step.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "can't be captured" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["progress"] == 1
    assert not found["unrehearsed"], "what is compiled ahead isn't what is captured"
    assert {
        "rms_norm_kernel", "linear_kernel", "rope_store_kernel", "plan_kernel", "decode_kernel", "prefill_kernel",
        "adjust_kernel", "threshold_kernel", "choose_kernel", "activation_mul_kernel",
        "conv_kernel", "recur_kernel", "gated_norm_kernel", "gate_mul_kernel",
    } <= set(found["kernels"])  # fmt: skip

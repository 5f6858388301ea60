"""Products over weights as checkpoints pack them, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu import reference_gpu
from tokenmill.kernels.gpu.cases import relative_error
from tokenmill.kernels.groups import Groups, Kind

FORMS: list[tuple[Kind, int, bool]] = [
    ("fp4", 32, False),
    ("int4", 32, True),
    ("int4", 128, True),
    ("int4", 128, False),
    ("int4", 256, True),
    ("int8", 256, False),
    ("fp8", 256, False),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(kind: Kind, group: int, minima: bool, *shape: int) -> Groups:
    """A random weight [..., out, in]."""
    generator = torch.Generator().manual_seed(shape[-1] + group)
    *before, inputs = shape
    scale = (torch.rand(*before, inputs // group, generator=generator) + 0.5) / 16
    minimum = -scale * torch.randint(0, 16, scale.shape, generator=generator) if minima else None
    narrow = kind in ("int4", "fp4")
    codes = torch.randint(0, 256, (*before, inputs // (2 if narrow else 1)), generator=generator)
    if narrow:
        return Groups(kind, codes.to(torch.uint8), scale, minimum, group)
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return Groups(kind, (codes - 128).to(dtype), scale, minimum, group)


@pytest.mark.parametrize(("kind", "group", "minima"), FORMS)
def test_a_weight_that_is_held_stands_for_the_same(kind: Kind, group: int, minima: bool) -> None:
    weight = packed(kind, group, minima, 24, 256)
    torch.testing.assert_close(gpu.hold(weight).dequantized(), weight.values(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "group", "minima"), FORMS)
@pytest.mark.parametrize(("rows", "activation"), [(1, None), (5, "silu"), (70, None)])
def test_linear(kind: Kind, group: int, minima: bool, rows: int, activation: str | None) -> None:
    weight, bias = gpu.hold(packed(kind, group, minima, 48, 256)), random(48, seed=2)
    x = random(rows, 256, seed=3) / 16
    out = gpu.linear(x, weight, bias=bias, activation=activation)
    expected = reference_gpu.linear(x, weight, bias=bias, activation=activation)
    assert relative_error(out, expected) < 3e-6
    if rows == 5:
        assert torch.equal(
            gpu.linear(x[3:4].contiguous(), weight, bias=bias, activation=activation), out[3:4]
        )


@pytest.mark.parametrize(("kind", "group", "minima"), FORMS[:3])
def test_mixture(kind: Kind, group: int, minima: bool) -> None:
    gate_up = gpu.hold(packed(kind, group, minima, 3, 2 * 256, 256))
    down = gpu.hold(packed(kind, group, minima, 3, 40, 256))
    x, weights = random(6, 256, seed=4) / 16, random(6, 2, seed=5).abs()
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, -1]], dtype=torch.int32)
    out = gpu.mixture(x, ids, weights, gate_up, down, "silu")
    assert relative_error(out, reference_gpu.mixture(x, ids, weights, gate_up, down, "silu")) < 3e-6


@pytest.mark.parametrize(
    "weight",
    [
        packed("fp4", 16, False, 4, 256),
        packed("int4", 32, False, 4, 96),
        packed("fp8", 128, False, 4, 256),
        packed("int8", 256, True, 4, 256),
    ],
    ids=["groups of 16", "odd groups", "blocks", "minima of 8 bits"],
)
def test_what_no_product_reads_is_refused(weight: Groups) -> None:
    with pytest.raises(ValueError, match=r"groups of|more than a scale"):
        gpu.hold(weight)


COMPILED = """
import json, torch
from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.offline import META, compiling_for

def weight(form, group, *shape):
    *before, inputs = shape
    data = torch.empty(*before, inputs // 2, dtype=torch.uint8, device=META)
    parts = 2 if form == 2 else 1
    return gpu.QuantizedWeight(data, torch.empty(*before, parts * inputs // group, device=META), group, form)

with compiling_for(90) as compiled:
    for rows in (1, 40, 200):
        x = torch.empty(rows, 2880, dtype=torch.bfloat16, device=META)
        gpu.linear(x, weight(1, 32, 512, 2880))
        gpu.linear(x, weight(2, 32, 512, 2880), activation="silu")
        ids = torch.empty(rows, 4, dtype=torch.int32, device=META)
        weights = torch.empty(rows, 4, device=META)
        gpu.mixture(x, ids, weights, weight(1, 32, 8, 5760, 2880), weight(1, 32, 8, 2880, 2880), "swiglu_oai")
print(json.dumps([[kernel.name, kernel.shared] for kernel in compiled]))
"""


@pytest.mark.slow
def test_they_compile_for_a_chip_and_fit_it() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"linear_kernel", "expert_kernel"} <= {name for name, _ in found}
    assert max(shared for _, shared in found) <= 227 * 1024

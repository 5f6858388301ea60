"""Rows of activations in e4m3 and linears over them, under Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu import reference_gpu
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.fp8_matmul import FEW, MANY, SOME, Fp8Tile, tile_for
from tokenmill.kernels.gpu.fp8_rows import Fp8Rows, empty_rows
from tokenmill.kernels.gpu.jit import FP8, FP8_MAX
from tokenmill.kernels.gpu.quantize import QuantizedWeight, quantize_fp8, quantize_int8
from tokenmill.kernels.gpu.selfcheck.fp8 import crowds
from tokenmill.kernels.gpu.selfcheck.trial import make_trial

CPU = torch.device("cpu")
TILES = (FEW, SOME, *MANY)
# The interpreter truncates where the chip rounds to nearest.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}

# Infinity in a row is NaN times it, and exp saturates where the functions are flat; numpy remarks on both.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Integers that e4m3 holds, few enough that no float32 sum of their products is rounded."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def same(mine: Fp8Rows, expected: Fp8Rows) -> bool:
    """Equal codes and scales (NaN where it should be), but for the sign of a zero."""
    return relative_error(mine.scale, expected.scale) == relative_error(mine.data, expected.data) == 0.0


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (1, 64), (3, 100), (16, 257), (17, 1000)])
def test_quantize_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    spread = torch.logspace(-6, 6, rows)[:, None] if dtype != torch.float16 else torch.ones(1)
    x = (random(rows, width) * spread).to(dtype)
    out = empty_rows(rows, width, dtype, CPU)
    out.data.view(torch.uint8).fill_(0x7F)
    out.scale.fill_(float("nan"))
    assert same(gpu.quantize_rows(x, out=out), reference_gpu.quantize_rows(x))
    meant = out.data.float() * out.scale[:, None]
    assert out.data.float().abs().amax(1).eq(FP8_MAX).all()
    # Half a step of three fraction bits, or half of the smallest step.
    allowed = torch.maximum(x.float().abs() / 16, out.scale[:, None] * 2.0**-10) * 1.001
    assert ((meant - x.float()).abs() <= allowed).all()


def test_every_code_and_every_tie_rounds_as_torch_does() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([middles * (1 + 2.0**-20), middles * (1 - 2.0**-20)])
    x = torch.cat([codes, middles, near])[None]
    x = torch.cat([x, -x], dim=1)
    assert x.amax() == FP8_MAX
    assert same(gpu.quantize_rows(x), reference_gpu.quantize_rows(x))
    assert torch.equal(gpu.quantize_rows(x).data.float(), x.to(FP8).float())


def test_rows_of_zeros_tiny_rows_and_strides() -> None:
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e-38), random(40), -torch.ones(40)])
    out = gpu.quantize_rows(x)
    assert same(out, reference_gpu.quantize_rows(x))
    assert torch.isfinite(out.scale).all()
    assert not out.data[0].float().any()
    wide = torch.cat([x, random(4, 9)], dim=1)
    assert same(gpu.quantize_rows(wide[:, :40]), out)
    with pytest.raises(ValueError, match="side by side"):
        gpu.quantize_rows(x.T)


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tile", [FEW, MANY[-1]])
def test_what_is_not_finite_stays_visible(wild: float, tile: Fp8Tile) -> None:
    x = random(4, 64)
    x[1, 7] = wild
    rows, weight = gpu.quantize_rows(x), quantize_fp8(random(33, 64, seed=1))
    assert same(rows, reference_gpu.quantize_rows(x))
    out = gpu.fp8_linear(rows, weight, residual=random(4, 33), tile=tile)
    assert out[1].isnan().all()
    assert torch.isfinite(out[[0, 2, 3]]).all()
    alternating = QuantizedWeight(weight.data[:32], weight.scale[:32], 0)
    assert gpu.fp8_linear(rows, alternating, activation="silu", tile=tile)[1].isnan().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [(1, 16, 64), (15, 33, 300), (16, 64, 512), (17, 65, 1040), (40, 130, 300), (129, 129, 64)],
)
def test_fp8_linear(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x = gpu.quantize_rows(random(rows, inputs, dtype=dtype))
    weight = quantize_fp8(random(outputs, inputs, seed=1))
    bias, residual = random(outputs, dtype=dtype, seed=2), random(rows, outputs, dtype=dtype, seed=3)
    out = poisoned(rows, outputs, dtype=dtype, device=CPU)
    gpu.fp8_linear(x, weight, bias=bias, residual=residual, out=out)
    expected = reference_gpu.fp8_linear(x, weight, bias=bias, residual=residual)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    gpu.fp8_linear(x, weight, residual=residual, out=residual)
    plain = gpu.fp8_linear(x, weight)
    assert plain.dtype == dtype
    assert relative_error(plain, reference_gpu.fp8_linear(x, weight)) < TOLERANCE[dtype]
    assert torch.equal(gpu.fp8_linear(x, weight, bias=bias), gpu.fp8_linear(x, weight, bias=bias.float()))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("tile", TILES)
def test_gated(tile: Fp8Tile, activation: str) -> None:
    x, gate_up, bias = random(19, 192), random(2 * 40, 192, seed=1) * 0.1, random(80, seed=2)
    rows = gpu.quantize_rows(x)
    weight = quantize_fp8(gpu.interleaved(gate_up))
    residual = random(19, 40, seed=3)
    keywords = {"bias": gpu.interleaved(bias), "activation": activation, "residual": residual}
    out = gpu.fp8_linear(rows, weight, tile=tile, **keywords)
    assert relative_error(out, reference_gpu.fp8_linear(rows, weight, **keywords)) < 2e-6
    exact = reference.activation_mul(x @ gate_up.T + bias, activation) + residual
    assert out.shape == (19, 40)
    assert relative_error(out, exact) < 0.05


def test_interleaving_puts_each_gate_before_its_up() -> None:
    assert gpu.interleaved(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_row_is_the_same_in_every_crowd_and_tile() -> None:
    """Sums that are exact in any order show what a tile must not change: masks, scales, epilogues."""
    x = whole(130, 1100)
    x[:, 0] = FP8_MAX
    rows, weight = gpu.quantize_rows(x * 0.25), quantize_fp8(whole(70, 1100, seed=1) * 0.3)
    keywords = {"bias": random(70, seed=2), "activation": "silu"}
    every = gpu.fp8_linear(rows, weight, tile=MANY[0], **keywords)
    for tile in TILES:
        assert torch.equal(gpu.fp8_linear(rows, weight, tile=tile, **keywords), every)
    for count in (1, 16, 17, 33, 65):
        some = Fp8Rows(rows.data[:count], rows.scale[:count], rows.dtype)
        assert torch.equal(gpu.fp8_linear(some, weight, **keywords), every[:count])
    last = Fp8Rows(rows.data[129:], rows.scale[129:], rows.dtype)
    assert torch.equal(gpu.fp8_linear(last, weight, **keywords), every[129:])


def test_tiles_follow_the_rows_and_fill_the_chip() -> None:
    assert [tile_for(rows, 4096) for rows in (1, 16, 17, 32)] == [FEW, FEW, SOME, SOME]
    assert tile_for(33, 4096) == MANY[2]
    assert tile_for(256, 4096) == MANY[1]
    assert tile_for(1024, 4096) == MANY[0]
    assert tile_for(64, 28672) == MANY[1]
    for tile in TILES:
        assert 512 % tile.block_k == 0


def test_nothing_and_wrong_weights() -> None:
    weight = quantize_fp8(random(32, 64))
    assert gpu.fp8_linear(gpu.quantize_rows(random(0, 64)), weight).shape == (0, 32)
    rows = gpu.quantize_rows(random(2, 64))
    with pytest.raises(ValueError, match="fp8 weight of 64 inputs is needed"):
        gpu.fp8_linear(rows, quantize_fp8(random(32, 32)))
    with pytest.raises(ValueError, match="int8"):
        gpu.fp8_linear(rows, quantize_int8(random(32, 64)))
    with pytest.raises(ValueError, match="activation must be one of"):
        gpu.fp8_linear(rows, weight, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 32), (1, 33), (17, 200)])
def test_a_norm_rounds_its_rows_as_a_pass_of_its_own_would(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, width + 3, dtype=dtype)[:, :width], random(width, dtype=dtype, seed=1)
    if rows > 1:
        x[0], x[1, 3] = 0.0, float("inf")
    fused = gpu.rms_norm_rows(x, weight, 1e-5, 1.0)
    assert fused.dtype == dtype
    assert same(fused, gpu.quantize_rows(gpu.rms_norm(x, weight, 1e-5, 1.0)))
    assert fused.scale.isnan().tolist() == [rows > 1 and row == 1 for row in range(rows)]


def test_the_crowds_of_the_self_check_agree_where_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip its inputs are random; the interpreter's products are numpy's, whose order follows their shapes."""

    def integers(*shape: int, generator: torch.Generator) -> Tensor:
        x = torch.randint(-8, 9, shape, generator=generator).float()
        x[:, 0] = FP8_MAX
        return x

    monkeypatch.setattr(torch, "randn", integers)
    trial = dataclasses.replace(make_trial(CPU, seed=3), width=40)
    found = list(crowds(trial, outputs=66))
    assert len(found) == 10
    assert all(result.error == result.tolerance == 0.0 for result in found)

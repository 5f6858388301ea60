"""Packed linear layers against float64 products: every instruction set, type, epilogue and odd size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.cpu import library
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using
from tokenmill.kernels.cpu.linear import PackedLinear

TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
SIZES = [(1, 1), (31, 33), (32, 32), (33, 31), (50, 70), (64, 100), (192, 576), (66, 1537)]
"""(outputs, inputs)"""


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


def gated(y: Tensor, activation: str) -> Tensor:
    gate, up = y.chunk(2, -1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
def test_product_and_epilogue(
    isa: InstructionSet, dtype: torch.dtype, outputs: int, inputs: int, activation: str | None
) -> None:
    if activation is not None and outputs % 2:
        outputs += 1
    generator = torch.Generator().manual_seed(outputs * 31 + inputs)
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    linear = PackedLinear(weight, bias, activation)
    x = torch.randn(37, inputs, generator=generator).to(dtype)
    residual = torch.randn(37, linear.out_features, generator=generator).to(dtype)
    plain = x.double() @ weight.double().T + bias.double()
    exact = plain if activation is None else gated(plain, activation)
    assert relative_error(linear(x), exact) < TOLERANCE[dtype]
    assert relative_error(linear(x, residual), exact + residual.double()) < TOLERANCE[dtype]
    in_place = residual.clone()
    assert linear(x, in_place, out=in_place) is in_place
    assert torch.equal(in_place, linear(x, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_row_is_the_same_bits_in_every_batch(
    isa: InstructionSet, dtype: torch.dtype, activation: str | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(96, 200, generator=generator) / 14).to(dtype)
    linear = PackedLinear(weight, torch.randn(96, generator=generator), activation)
    x = torch.randn(70, 200, generator=generator).to(dtype)
    residual = torch.randn(70, linear.out_features, generator=generator).to(dtype)
    whole = linear(x, residual)
    for rows in range(1, 71):
        assert torch.equal(linear(x[:rows], residual[:rows]), whole[:rows])
    for row in range(70):
        assert torch.equal(linear(x[row : row + 1], residual[row : row + 1]), whole[row : row + 1])
    order = torch.randperm(70, generator=generator)
    assert torch.equal(linear(x[order].contiguous(), residual[order].contiguous()), whole[order])


def test_panels_of_many_rows_change_nothing(isa: InstructionSet) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(40, 2048, generator=generator) / 45).to(torch.bfloat16)
    linear = PackedLinear(weight)
    x = torch.randn(700, 2048, generator=generator).to(torch.bfloat16)
    whole = linear(x)
    for first, last in ((0, 1), (127, 129), (128, 130), (511, 513), (650, 700)):
        assert torch.equal(linear(x[first:last].contiguous()), whole[first:last])


def test_long_rows_in_chunks_change_nothing(isa: InstructionSet) -> None:
    x = torch.randn(600, 4133).to(torch.bfloat16)
    layer = PackedLinear((torch.randn(70, 4133) * 0.05).to(torch.bfloat16))
    whole = layer(x)
    for first, last in ((0, 1), (299, 301), (570, 600)):
        assert torch.equal(layer(x[first:last]), whole[first:last])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(isa: InstructionSet, threads: int) -> None:
    """Few rows, whose columns anyone takes in order, and many, of which each thread has its own."""
    generator = torch.Generator().manual_seed(2)
    linear = PackedLinear(torch.randn(100, 64, generator=generator).to(torch.bfloat16))
    few, many = (torch.randn(rows, 64, generator=generator).to(torch.bfloat16) for rows in (9, 1100))
    library.set_threads(1)
    alone = linear(few), linear(many)
    try:
        library.set_threads(threads)
        for _ in range(30):
            assert torch.equal(linear(few), alone[0])
            assert torch.equal(linear(many), alone[1])
    finally:
        library.set_threads(library.default_threads())


def test_types_may_be_mixed(isa: InstructionSet) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 65, generator=generator)
    x = torch.randn(5, 65, generator=generator)
    exact = x.double() @ weight.double().T
    wide = PackedLinear(weight)(x.bfloat16(), out=torch.empty(5, 48))
    assert relative_error(wide, x.bfloat16().double() @ weight.double().T) < 1e-6
    narrow = PackedLinear(weight.bfloat16())(x)
    assert relative_error(narrow, x.double() @ weight.bfloat16().double().T) < 1e-6
    assert relative_error(PackedLinear(weight.bfloat16())(x.bfloat16(), out=torch.empty(5, 48)), exact) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("outputs", "inputs"), [(2, 1), (70, 33), (64, 64)])
def test_rows_come_back(
    isa: InstructionSet, dtype: torch.dtype, activation: str | None, outputs: int, inputs: int
) -> None:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(4)).to(dtype)
    linear = PackedLinear(weight, activation=activation)
    ids = torch.tensor([outputs - 1, 0, outputs // 2, 0])
    assert torch.equal(linear.rows(ids, dtype), weight[ids])
    assert torch.equal(linear.rows(ids, torch.float32), weight[ids].float())


def test_no_rows_and_no_padding_leaks(isa: InstructionSet) -> None:
    linear = PackedLinear(torch.ones(20, 40, dtype=torch.bfloat16))
    assert linear(torch.empty(0, 40, dtype=torch.bfloat16)).shape == (0, 20)
    # Rows lie one after the other: what follows a row's 40 inputs in memory is the next row.
    x = torch.full((3, 40), float("inf"), dtype=torch.bfloat16)
    x[1] = 1.0
    assert linear(x)[1].tolist() == [40.0] * 20


def test_what_does_not_fit_is_refused(isa: InstructionSet) -> None:
    linear = PackedLinear(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="x must be"):
        linear(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="residual"):
        linear(torch.zeros(2, 8), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="out must be"):
        linear(torch.zeros(2, 8), out=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="activation"):
        PackedLinear(torch.zeros(4, 8), activation="relu")
    with pytest.raises(ValueError, match="odd"):
        PackedLinear(torch.zeros(5, 8), activation="silu")
    with pytest.raises(ValueError, match="weight"):
        PackedLinear(torch.zeros(5, 8, dtype=torch.float16))

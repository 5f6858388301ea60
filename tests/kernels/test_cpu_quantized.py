"""Quantized linear layers against their own dequantized weights, GGUF blocks against gguf's reader."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import pytest
import torch
from torch import Tensor

from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using
from tokenmill.kernels.cpu.linear import PackedLinear
from tokenmill.kernels.cpu.quantized import BLOCKS, QuantizedLinear
from tokenmill.kernels.groups import Groups

TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 3e-6}


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


def random_blocks(kind: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Random bytes with sane scales, and what gguf reads from them."""
    block, generator = BLOCKS[kind], torch.Generator().manual_seed(outputs + inputs)
    count = inputs // block.elements
    blocks = torch.randint(
        0, 256, (outputs, count, block.block_bytes), dtype=torch.uint8, generator=generator
    )
    if block.powers:
        blocks[:, :, 0] = torch.randint(100, 125, (outputs, count), dtype=torch.uint8, generator=generator)
    for at in () if block.powers else block.scale_at or ((0, 2) if block.minima else (0,)):
        factors = torch.rand(outputs, count, 1, generator=generator) * 0.01 - 0.002
        blocks[:, :, at : at + 2] = factors.half().view(torch.uint8).reshape(outputs, count, 2)
    blocks = blocks.reshape(outputs, -1)
    exact = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    return blocks, torch.from_numpy(exact)


def check_products(linear: QuantizedLinear, weight: Tensor, bias: Tensor | None = None) -> None:
    """The layer's products with 40 rows against `weight`, and rows alone against rows together."""
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(40, weight.shape[1], generator=torch.Generator().manual_seed(5)).to(dtype)
        exact = x.double() @ weight.double().T
        if bias is not None:
            exact += bias.double()
        if linear.activation is not None:
            gate, up = exact.chunk(2, -1)
            exact = torch.nn.functional.silu(gate) * up
        ours = linear(x)
        assert (ours.double() - exact).norm() < tolerance * exact.norm()
        for rows in (1, 2, 3, 15, 16, 17, 31, 32, 33, 39):
            assert torch.equal(linear(x[:rows]), ours[:rows])
        for row in (7, 16, 39):
            assert torch.equal(linear(x[row : row + 1].contiguous()), ours[row : row + 1])


def random_groups(kind: str, group: int, minima: bool, outputs: int, inputs: int) -> Groups:
    """A weight of random codes; scales that half precision holds, a factor of a million between the least and most."""
    generator = torch.Generator().manual_seed(outputs + inputs + group)
    narrow = kind in ("int4", "fp4")
    codes = torch.randint(0, 256, (outputs, inputs // (2 if narrow else 1)), generator=generator)
    count = -(-inputs // group)
    powers = torch.randint(-20, 1, (outputs, count), generator=generator)
    scale = torch.ldexp(1 + torch.randint(0, 8, (outputs, count), generator=generator) / 8, powers) / 64
    minimum = -scale * torch.randint(0, 16, (outputs, count), generator=generator)
    return Groups(
        kind,  # type: ignore[arg-type]
        codes.to(torch.uint8) if narrow else (codes - 128).to(torch.int8),
        scale,
        minimum if minima else None,
        group,
    )


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 256), (64, 512), (50, 768)])
def test_gguf_blocks(isa: InstructionSet, kind: str, outputs: int, inputs: int) -> None:
    blocks, exact = random_blocks(kind, outputs, inputs)
    linear = QuantizedLinear.from_blocks(blocks, kind)
    weight = linear.rows(torch.arange(outputs), torch.float32)
    if BLOCKS[kind].scale_at:  # group scales are products, rounded to half precision
        assert (weight - exact).norm() < 4e-4 * exact.norm()
    else:
        assert torch.equal(weight, exact)
    check_products(linear, weight)


def test_gguf_gate_and_up(isa: InstructionSet) -> None:
    blocks, _ = random_blocks("Q4_1", 70, 288)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1))
    linear = QuantizedLinear.from_blocks(blocks, "Q4_1", bias, "silu")
    check_products(linear, linear.rows(torch.arange(70), torch.float32), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group", "bound"), [(8, None, 0.012), (8, 64, 0.008), (4, None, 0.1), (4, 128, 0.13)]
)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 256), (49, 100), (33, 1537)])
def test_rounded_weights(
    isa: InstructionSet,
    dtype: torch.dtype,
    bits: int,
    group: int | None,
    bound: float,
    outputs: int,
    inputs: int,
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    given = (torch.randn(outputs, inputs, generator=generator) / 1000).to(dtype)
    bias = torch.randn(outputs, generator=generator)
    linear = QuantizedLinear(given, bits, group, bias)
    weight = linear.rows(torch.arange(outputs), torch.float32)
    assert (weight - given.float()).norm() < bound * given.float().norm()
    check_products(linear, weight, bias)


def test_extreme_scales_keep_their_precision(isa: InstructionSet) -> None:
    for size in (1e-30, 1e-8, 1e4, 1e30):
        given = torch.linspace(-1, 1, 64).expand(16, 64).contiguous() * size
        rows = QuantizedLinear(given, 8).rows(torch.arange(16), torch.float32)
        assert (rows - given).abs().max() <= size / 127 * 0.51
    assert QuantizedLinear(torch.zeros(4, 32), 8).rows(torch.arange(4), torch.float32).abs().sum() == 0
    assert QuantizedLinear(torch.zeros(4, 32), 4).rows(torch.arange(4), torch.float32).abs().sum() == 0


def test_sizes_shrink_as_the_bits_say(isa: InstructionSet) -> None:
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    assert QuantizedLinear(weight, 8).data.numel() == 64 * 256 + 64 * 2
    assert QuantizedLinear(weight, 4).data.numel() == 64 * 256 // 2 + 64 * 8 * 4
    blocks, _ = random_blocks("Q4_0", 64, 256)
    assert QuantizedLinear.from_blocks(blocks, "Q4_0").data.numel() == blocks.numel()


def test_what_does_not_fit_is_refused(isa: InstructionSet) -> None:
    with pytest.raises(ValueError, match="bits"):
        QuantizedLinear(torch.zeros(4, 32), 3)
    with pytest.raises(ValueError, match="group"):
        QuantizedLinear(torch.zeros(4, 32), 4, group=48)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        QuantizedLinear(torch.zeros(4, 32, dtype=torch.float16), 8)
    with pytest.raises(ValueError, match="block type"):
        QuantizedLinear.from_blocks(torch.zeros(4, 18, dtype=torch.uint8), "IQ2_XS")
    with pytest.raises(ValueError, match="blocks must be"):
        QuantizedLinear.from_blocks(torch.zeros(4, 19, dtype=torch.uint8), "Q4_0")


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", sorted({"amx"} & {isa.name for isa in supported()}))
def test_bfloat16_rows_meet_bfloat16_weights(name: str, kind: str) -> None:
    """Where the matrix unit multiplies, a product is to the bit that of the unpacked weight."""
    blocks, _ = random_blocks(kind, 50, 2304)
    x = torch.randn(70, 2304, generator=torch.Generator().manual_seed(2)).bfloat16()
    with using(next(isa for isa in supported() if isa.name == name)):
        packed = QuantizedLinear.from_blocks(blocks, kind)
        plain = PackedLinear(packed.rows(torch.arange(50), torch.bfloat16))
        for rows in (1, 31, 70):
            assert torch.equal(packed(x[:rows]), plain(x[:rows]))


VECTORS = [isa for isa in supported() if isa.name != "amx"]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("vectors", VECTORS, ids=lambda isa: isa.name)
def test_integers_cost_no_accuracy(vectors: InstructionSet, kind: str) -> None:
    """bfloat16 rows times exact weights: what integers of 16 bits lose is far below what bfloat16 has."""
    blocks, _ = random_blocks(kind, 50, 768)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(9, 768, generator=generator)
    x[:, ::97] *= 300  # outliers spoil their own 32 inputs at most
    x = x.bfloat16()
    with using(vectors):
        linear = QuantizedLinear.from_blocks(blocks, kind)
        weight = linear.rows(torch.arange(50), torch.float32)
        ours = linear(x, out=torch.empty(9, 50))
    exact = x.double() @ weight.double().T
    assert (ours.double() - exact).norm() < 2e-4 * exact.norm()


@pytest.mark.parametrize("vectors", VECTORS, ids=lambda isa: isa.name)
def test_rows_of_any_size(vectors: InstructionSet) -> None:
    generator = torch.Generator().manual_seed(7)
    with using(vectors):
        linear = QuantizedLinear(torch.randn(33, 96, generator=generator), 4)
        x = torch.randn(5, 96, generator=generator).bfloat16()
        whole = linear(x, out=torch.empty(5, 33))
        for power in (-100, 100):
            scaled = linear((x.float() * 2.0**power).bfloat16(), out=torch.empty(5, 33))
            assert torch.equal(scaled, whole * 2.0**power)
        assert not linear(torch.zeros_like(x)).any()
        x[1, 5], x[3, 90] = float("nan"), float("inf")
        spoiled = linear(x, out=torch.empty(5, 33))
    assert spoiled[[1, 3]].isnan().all()
    assert torch.equal(spoiled[[0, 2, 4]], whole[[0, 2, 4]])


@pytest.mark.parametrize(
    ("kind", "group", "minima"),
    [
        ("fp4", 32, False),
        ("fp4", 16, False),
        ("int4", 128, False),
        ("int4", 64, True),
        ("int4", 416, True),
        ("int8", 416, False),
        ("int8", 32, True),
    ],
)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 832), (50, 416)])
def test_groups(kind: str, group: int, minima: bool, outputs: int, inputs: int, isa: InstructionSet) -> None:
    groups = random_groups(kind, group, minima, outputs, inputs)
    linear, weight = QuantizedLinear.from_groups(groups), groups.values()
    assert torch.equal(linear.rows(torch.arange(outputs), torch.float32), weight)
    check_products(linear, weight)


def test_groups_with_gate_and_bias(isa: InstructionSet) -> None:
    groups = random_groups("fp4", 32, False, 96, 96)
    bias = torch.randn(96, generator=torch.Generator().manual_seed(1))
    check_products(QuantizedLinear.from_groups(groups, bias, "silu"), groups.values(), bias)


def test_groups_take_what_they_need() -> None:
    groups = random_groups("fp4", 32, False, 64, 256)
    assert QuantizedLinear.from_groups(groups).data.numel() == 64 * 256 // 2 + 64 * 8 * 2


def test_strange_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        QuantizedLinear.from_groups(random_groups("int4", 24, True, 4, 48))
    with pytest.raises(ValueError, match="in pairs"):
        QuantizedLinear.from_groups(random_groups("fp4", 16, False, 4, 48))
    eights = Groups("fp8", torch.zeros(4, 32, dtype=torch.float8_e4m3fn), torch.ones(4, 1), None, 32)
    with pytest.raises(ValueError, match="fp8"):
        QuantizedLinear.from_groups(eights)

"""bfloat16 weights in twelve bits: the same bits as plain ones, on every instruction set, whatever the values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.cpu import linear
from tokenmill.kernels.cpu.isa import supported
from tokenmill.kernels.cpu.library import using
from tokenmill.kernels.cpu.linear import BFLOAT16, CODED, PackedLinear

SIZES = [(1, 32), (32, 32), (33, 31), (64, 100), (96, 576), (128, 2100)]
"""(outputs, inputs); the last is taken chunk by chunk where rows are many."""
ROWS = (1, 2, 16, 17, 32, 33, 70, 300)


@pytest.fixture(params=supported(), ids=lambda isa: isa.name, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


def random_weight(outputs: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(outputs + inputs)
    return (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).bfloat16()


def both(weight: Tensor, activation: str | None, monkeypatch: pytest.MonkeyPatch) -> list[PackedLinear]:
    """The weight plain, and coded wherever that is possible."""
    packed = []
    for names in (set[str](), {isa.name for isa in supported()}):
        monkeypatch.setattr(linear, "CODED_ON", names)
        packed.append(PackedLinear(weight, activation=activation))
    return packed


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_products_are_the_same_bits(
    outputs: int, inputs: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(outputs + outputs % 2 if activation else outputs, inputs)
    if weight.numel() > 5000:
        weight[0, :3] = torch.tensor([1e-30, -3e30, 0.0])
    monkeypatch.setattr(linear, "EXCEPTION_RATE", 4)
    plain, coded = both(weight, activation, monkeypatch)
    assert (plain.struct.format, coded.struct.format) == (BFLOAT16, CODED)
    x = torch.randn(max(ROWS), inputs).bfloat16()
    for rows in ROWS:
        assert torch.equal(coded(x[:rows]), plain(x[:rows])), rows
    wide = x[:40].float()
    assert torch.equal(coded(wide), plain(wide))


def test_rows_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(96, 333)
    weight[:, 332] = torch.tensor([1e-30, -1e30, 0.0, -0.0] * 24)
    weight[95, 0] = torch.finfo(torch.bfloat16).tiny / 4
    weight[50, 7] = float("inf")
    coded = both(weight, None, monkeypatch)[1]
    assert coded.struct.format == CODED
    assert coded.struct.exception_count > 0
    ids = torch.randperm(96)
    assert torch.equal(coded.rows(ids).view(torch.int16), weight[ids].view(torch.int16))
    assert torch.equal(coded.rows(ids, torch.float32), weight[ids].float())


def test_every_upper_byte_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 65,536 bit patterns, most of them outside of any table."""
    weight = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    monkeypatch.setattr(linear, "EXCEPTION_RATE", 1)
    coded = both(weight, None, monkeypatch)[1]
    assert coded.struct.format == CODED
    assert coded.struct.exception_count == 65536 - 16 * 256
    assert torch.equal(coded.rows(torch.arange(256)).view(torch.int16), weight.view(torch.int16))


def test_weights_of_all_magnitudes_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (random_weight(64, 64).float() * torch.logspace(-30, 30, 64)).bfloat16()
    plain, tried = both(weight, None, monkeypatch)
    assert tried.struct.format == BFLOAT16
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(tried(x), plain(x))


def test_a_coded_weight_takes_three_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, coded = both(random_weight(96, 576), None, monkeypatch)
    assert len(coded.data) * 4 == len(plain.data) * 3
    assert (plain.saved_bytes, coded.saved_bytes) == (0, len(plain.data) - len(coded.data))
    assert coded.struct.exception_count * 256 < 96 * 576

"""Skinny linears, quantized weights and mixtures of experts under Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu import linear_config, reference_gpu
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.linear_config import LinearConfig
from tokenmill.kernels.gpu.moe_routing import lay_out
from tokenmill.kernels.gpu.quantize import QuantizedWeight, quantize_fp8, quantize_int4, quantize_int8
from tokenmill.kernels.gpu.skinny_linear import make_linear_workspace
from tokenmill.kernels.reference import Routing

CPU = torch.device("cpu")
# The interpreter truncates where the chip rounds to nearest.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def force(monkeypatch: pytest.MonkeyPatch, splits: int, block_n: int = 16, block_k: int = 64) -> None:
    config = LinearConfig(block_n, block_k, splits, 3, 4)
    monkeypatch.setattr(linear_config, "_modelled", lambda *_: config)


@pytest.mark.parametrize(
    ("splits", "dtype"),
    [*((splits, torch.float32) for splits in (1, 2, 4)), (1, torch.float16), (4, torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 16), (3, 576, 33), (16, 300, 48), (17, 128, 5)]
)
def test_linear(
    rows: int, inputs: int, outputs: int, splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, splits)
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    bias, residual = random(outputs, dtype=dtype, seed=2), random(rows, outputs, dtype=dtype, seed=3)
    out = poisoned(rows, outputs, dtype=dtype, device=CPU)
    gpu.linear(x, weight, bias=bias, residual=residual, out=out)
    expected = reference_gpu.linear(x, weight, bias=bias, residual=residual)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(gpu.linear(x, weight), reference_gpu.linear(x, weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_many_rows(dtype: torch.dtype, activation: str | None) -> None:
    x, weight = random(150, 200, dtype=dtype), random(2 * 150, 200, dtype=dtype, seed=1) * 0.1
    out = gpu.linear(x, weight, activation=activation)
    assert relative_error(out, reference_gpu.linear(x, weight, activation=activation)) < TOLERANCE[dtype]
    few = gpu.linear(x, weight, activation=activation, tile_rows=32)
    assert relative_error(few, out) < TOLERANCE[dtype]
    fours = quantize_int4(random(96, 256, seed=2), 32)
    many = random(80, 256, dtype=dtype, seed=3)
    out = gpu.linear(many, fours, activation=activation)
    assert relative_error(out, reference_gpu.linear(many, fours, activation=activation)) < TOLERANCE[dtype]
    with pytest.raises(ValueError, match="16, 32, 64 or 128"):
        gpu.linear(x, weight, tile_rows=48)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("splits", [1, 2])
def test_gated_linear(activation: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, splits)
    x, weight, bias = random(3, 192), random(2 * 40, 192, seed=1) * 0.1, random(80, seed=2)
    out = gpu.linear(x, weight, bias=bias, activation=activation)
    assert out.shape == (3, 40)
    expected = reference_gpu.linear(x, weight, bias=bias, activation=activation)
    assert relative_error(out, expected) < 2e-6


def quantized_weights(outputs: int, inputs: int) -> list[QuantizedWeight]:
    weight = random(outputs, inputs, seed=5)
    fours = [quantize_int4(weight, group) for group in (32, 64, 128)]
    return [quantize_fp8(weight), quantize_int8(weight), *fours]


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_quantized_linear(
    kind: int, splits: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, splits)
    weight, x = quantized_weights(48, 512)[kind], random(2, 512)
    out = gpu.linear(x, weight, activation=activation)
    assert relative_error(out, reference_gpu.linear(x, weight, activation=activation)) < 3e-6


@pytest.mark.parametrize("kind", range(5))
def test_quantized_weights_are_near_what_they_stand_for(kind: int) -> None:
    weight = random(40, 512, seed=5)
    allowed = [0.04, 0.01, 0.12, 0.13, 0.14][kind]
    assert 0 < relative_error(quantized_weights(40, 512)[kind].dequantized(), weight) < allowed


def test_zero_weights_and_wrong_groups() -> None:
    for quantize in (quantize_fp8, quantize_int8, quantize_int4):
        assert not quantize(torch.zeros(2, 128)).dequantized().any()
    with pytest.raises(ValueError, match="32, 64 or 128"):
        quantize_int4(torch.zeros(2, 128), 16)
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize_int4(torch.zeros(2, 128), 128)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_alone_and_in_any_crowd(
    splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, splits)
    x, weight = random(19, 256, dtype=dtype), random(32, 256, dtype=dtype, seed=1)
    sixteen = gpu.linear(x[:16], weight)
    for rows in (1, 5):
        assert torch.equal(bits(gpu.linear(x[:rows], weight)), bits(sixteen[:rows]))
    assert torch.equal(bits(gpu.linear(x[7:8], weight)), bits(sixteen[7:8]))


@pytest.mark.parametrize(
    ("rows", "inputs", "splits", "dtype"),
    [
        (1, 64, 1, torch.float32),
        (1, 1024, 4, torch.float16),
        (2, 1040, 4, torch.bfloat16),
        (5, 576, 1, torch.float16),
        (8, 1104, 2, torch.float32),
        (8, 1104, 2, torch.bfloat16),
    ],
)
def test_a_product_norms_its_rows_as_the_norm_does(
    rows: int, inputs: int, splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, splits)
    x, weight = random(rows, inputs, dtype=dtype) * 3, random(2 * 16, inputs, dtype=dtype, seed=1) * 0.1
    norm = gpu.RowNorm(random(inputs, dtype=dtype, seed=2), 1e-5, 0.5)
    bias = random(32, dtype=dtype, seed=3)
    for activation in (None, "silu"):
        out = gpu.linear(x, weight, bias=bias, activation=activation, norm=norm)
        expected = reference_gpu.linear(x, weight, bias=bias, activation=activation, norm=norm)
        assert relative_error(out, expected) < 2 * TOLERANCE[dtype]
        normed = gpu.rms_norm(x, norm.weight, norm.eps, norm.offset)
        assert torch.equal(bits(out), bits(gpu.linear(normed, weight, bias=bias, activation=activation)))
        alone = gpu.linear(x[-1:], weight, bias=bias, activation=activation, norm=norm)
        assert torch.equal(bits(alone), bits(out[-1:]))


@pytest.mark.parametrize("kind", range(5))
def test_quantized_products_norm_their_rows(kind: int) -> None:
    weight, wide = quantized_weights(48, 512)[kind], random(3, 608)
    x, norm = wide[:, :512], gpu.RowNorm(random(512, seed=1), 1e-6)
    normed = gpu.rms_norm(x, norm.weight, norm.eps)
    assert torch.equal(gpu.linear(x, weight, norm=norm), gpu.linear(normed, weight))


def test_a_product_norms_a_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, norm = random(9, 64), random(16, 64), gpu.RowNorm(random(64), 1e-5)
    with pytest.raises(ValueError, match="8 rows at the most, by 4 warps, not 9"):
        gpu.linear(x, weight, norm=norm)
    for odd in (random(2, 72), random(2, 72)[:, :64]):
        with pytest.raises(ValueError, match="rows of whole 16 inputs"):
            gpu.linear(odd, random(16, odd.shape[1]), norm=norm)
    monkeypatch.setattr(linear_config, "_modelled", lambda *_: LinearConfig(16, 64, 1, 3, 8))
    with pytest.raises(ValueError, match="by 4 warps"):
        gpu.linear(x[:1], weight, norm=norm)


def test_the_workspace_is_reused_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 4)
    space = make_linear_workspace(CPU, floats=4 * 3 * 32, tiles=2)
    x, weight = random(3, 256), random(32, 256, seed=1)
    for _ in range(2):
        out = gpu.linear(x, weight, workspace=space)
        assert relative_error(out, reference_gpu.linear(x, weight)) < 2e-6
        assert not space.done.any()
    with pytest.raises(ValueError, match="too small"):
        gpu.linear(random(4, 256), weight, workspace=space)
    with pytest.raises(ValueError, match="256 inputs"):
        gpu.linear(x, weight[:, :255])
    assert gpu.linear(x[:0], weight).shape == (0, 32)


@pytest.mark.parametrize("bits_a_weight", [4, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 64), (576, 576), (49152, 576), (4096, 14336), (128256, 4096)]
)
def test_configurations_cover_every_shape(outputs: int, inputs: int, bits_a_weight: int) -> None:
    for gated in (False, True):
        config = linear_config.linear_config(outputs, inputs, gated, bits_a_weight)
        assert config.block_n >= 16
        assert config.splits == 1 or config.splits * config.block_k <= inputs


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top"), [(0, 8, 2), (1, 8, 1), (5, 60, 6), (3, 128, 8)])
def test_route(tokens: int, experts: int, top: int, renormalize: bool) -> None:
    logits = (random(tokens, experts) * 2).round() / 2
    slots = torch.arange(tokens) - 1
    for keywords in ({}, {"slots": slots}):
        ids, weights = gpu.route(logits, Routing(top, renormalize), **keywords)
        expected_ids, expected_weights = reference.route(logits, Routing(top, renormalize), **keywords)
        assert torch.equal(ids, expected_ids)
        assert relative_error(weights, expected_weights) < 1e-6


ROUTINGS = {
    "sigmoid": Routing(4, scoring="sigmoid"),
    "scaled": Routing(4, renormalize=False, scale=2.5),
    "corrected softmax": Routing(4, bias=torch.linspace(-0.2, 0.2, 60)),
    "groups": Routing(4, groups=5, top_groups=2),
    "everything": Routing(
        6, False, "sigmoid", torch.linspace(0.5, -0.5, 60), groups=12, top_groups=3, scale=1.5
    ),
    "gains": Routing(4, scale=0.5, gains=torch.linspace(0.5, 2.0, 60)),
    "groups of one": Routing(3, bias=torch.linspace(0.5, -0.5, 60), groups=60, top_groups=4),
}


@pytest.mark.parametrize("way", ROUTINGS)
def test_ways_of_routing(way: str) -> None:
    routing = ROUTINGS[way]
    logits, slots = (random(9, 60) * 2).round() / 2, torch.arange(9) - 1
    ids, weights = gpu.route(logits, routing, slots)
    expected_ids, expected_weights = reference.route(logits, routing, slots)
    assert torch.equal(ids, expected_ids)
    assert relative_error(weights, expected_weights) < 1e-6


def test_impossible_routings_are_refused() -> None:
    logits = random(2, 60)
    for routing, message in (
        (Routing(61), "top must be from 1 to 60"),
        (Routing(2, groups=7), "from 1 of 7 groups"),
        (Routing(2, groups=4, top_groups=5), "from 5 of 4 groups"),
        (Routing(2, bias=torch.zeros(59)), "bias of 60 experts"),
        (Routing(2, gains=torch.zeros(59)), "gains of 60 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            gpu.route(logits, routing)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("tokens", [1, 7, 40, 700])
def test_pairs_are_laid_out_by_expert(tokens: int, rows: int) -> None:
    ids = torch.randint(-1, 6, (tokens, 2), generator=torch.Generator().manual_seed(tokens)).int()
    tiles = lay_out(ids, 7, rows)
    count = int(tiles.count)
    found: list[list[int]] = [[] for _ in range(7)]
    for tile, expert in zip(
        tiles.pairs[: count * rows].view(count, rows), tiles.experts[:count], strict=True
    ):
        found[int(expert)] += [pair for pair in tile.tolist() if pair >= 0]
    assert found == [(ids.flatten() == expert).nonzero().flatten().tolist() for expert in range(7)]
    assert sorted(tiles.experts[:count].tolist()) == tiles.experts[:count].tolist()


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("quantize", [None, quantize_fp8, quantize_int8, partial(quantize_int4, group=32)])
def test_mixture(
    tile_rows: int, quantize: Callable[[Tensor], QuantizedWeight] | None, activation: str
) -> None:
    tokens, experts, inner, width = 9, 5, 128, 64
    gate_up: Any = random(experts, 2 * inner, width, seed=1) * 0.2
    down: Any = random(experts, 72, inner, seed=2) * 0.2
    if quantize is not None:
        gate_up, down = quantize(gate_up), quantize(down)
    x, slots = random(tokens, width) * 3, torch.arange(tokens) - 2
    ids, weights = reference.route(random(tokens, experts, seed=3), Routing(2), slots)
    keywords: dict[str, Any] = {
        "gate_up_bias": random(experts, 2 * inner, seed=4),
        "down_bias": random(experts, 72, seed=5),
        "residual": random(tokens, 72, seed=6),
    }
    for settings in ({}, keywords):
        out = gpu.mixture(x, ids, weights, gate_up, down, activation, **settings, tile_rows=tile_rows)
        expected = reference_gpu.mixture(x, ids, weights, gate_up, down, activation, **settings)
        assert relative_error(out, expected) < 3e-6


def test_a_token_is_the_same_whoever_shares_its_experts() -> None:
    gate_up, down = random(4, 64, 32, seed=1), random(4, 32, 32, seed=2)
    x = random(20, 32)
    ids, weights = gpu.route(random(20, 4, seed=3), Routing(2))
    together = gpu.mixture(x, ids, weights, gate_up, down, "gelu", tile_rows=16)
    alone = gpu.mixture(x[5:6], ids[5:6], weights[5:6], gate_up, down, "gelu", tile_rows=16)
    assert torch.equal(bits(alone), bits(together[5:6]))
    assert gpu.mixture(x[:0], ids[:0], weights[:0], gate_up, down, "gelu").shape == (0, 32)
    with pytest.raises(ValueError, match="16 or 64"):
        gpu.mixture(x, ids, weights, gate_up, down, "gelu", tile_rows=8)

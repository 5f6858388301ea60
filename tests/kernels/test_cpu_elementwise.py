"""Norms, RoPE with the KV store, activations and the embedding on the CPU against kernels/reference.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import reference
from tokenmill.kernels.cpu import attention, elementwise
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=supported(), ids=lambda isa: isa.name)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    with using(request.param):
        yield request.param


def close(ours: Tensor, theirs: Tensor) -> None:
    """Rounding apart: 1e-6 in float32, one step of bfloat16."""
    assert ours.shape == theirs.shape
    tolerance = 5e-3 if ours.dtype == torch.bfloat16 else 1e-6
    difference = (ours.double() - theirs.double()).norm()
    assert difference <= tolerance * (theirs.double().norm() + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query", "key", "value"), [(64, 32, 32), (33, 5, 7), (16, 16, 0)])
def test_norms_over_all_heads(
    isa: InstructionSet, dtype: torch.dtype, query: int, key: int, value: int
) -> None:
    qkv = torch.randn(21, query + key + value).to(dtype)
    weights = [torch.randn(size).to(dtype) for size in (query, key)]
    q, k, v = qkv.split([query, key, value], dim=1)
    normed = [reference.rms_norm(x, w, 1e-5, 1.0) for x, w in zip((q, k), weights, strict=True)]
    close(elementwise.norm_whole(qkv, *weights, 1e-5, 1.0), torch.cat([*normed, v], dim=1))
    with pytest.raises(ValueError, match="don't hold"):
        elementwise.norm_whole(
            qkv[:, 1:].contiguous(), torch.ones(query + value + 1).to(dtype), weights[1], 1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 576, 20_000])
def test_norms(isa: InstructionSet, dtype: torch.dtype, rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = (torch.randn(rows, size, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    close(elementwise.rms_norm(x, weight, 1e-5, 1.0), reference.rms_norm(x, weight, 1e-5, 1.0))
    close(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    normed, total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    close(normed, expected)
    if size > 1:  # a single element minus its mean is only the rounding of zero
        close(elementwise.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
        close(elementwise.layer_norm(x, weight, None, 1e-5), reference.layer_norm(x, weight, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(isa: InstructionSet, dtype: torch.dtype, activation: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-1, 1, 999)]).to(dtype)
    wide = x.double()
    if activation == "silu":
        expected = torch.nn.functional.silu(wide)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        expected = torch.nn.functional.gelu(wide, approximate=approximate)
    ours = elementwise.activate(x, activation)
    torch.testing.assert_close(
        ours.double(), expected, rtol=5e-3 if dtype == torch.bfloat16 else 5e-6, atol=1e-12
    )
    for rows, width in ((0, 8), (1, 1), (3, 17), (40, 64)):
        gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
        gate, up = gate_up.chunk(2, -1)
        product = reference.activate(gate.float(), activation) * up.float()
        close(elementwise.activation_mul(gate_up, activation), product.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize(("size", "half"), [(64, 32), (64, 16), (80, 20), (24, 12), (128, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_store(
    isa: InstructionSet, dtype: torch.dtype, tokens: int, size: int, half: int, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(size + tokens)
    for normed, value_size, tables, block_size in (
        (False, size, "rows", 16),
        (True, 40, "context", 16),
        (True, size, "none", 32),
    ):
        qkv = torch.randn(tokens, 8 * size + 2 * value_size, generator=generator).to(dtype)
        rows = 99 if tables == "context" else tokens
        cos, sin = (
            None if tables == "none" else torch.randn(rows, half, generator=generator) for _ in range(2)
        )
        positions = torch.randint(0, 99, (tokens,), generator=generator) if tables == "context" else None
        slots = torch.randperm(9 * block_size, generator=generator)[:tokens]
        weights = [torch.randn(size, generator=generator).to(dtype) if normed else None for _ in range(2)]
        caches = [
            [torch.zeros(9, 2, block_size, n, dtype=dtype) for n in (size, value_size)] for _ in range(2)
        ]
        queries = [
            function(
                *(qkv, cos, sin, slots, k_cache, v_cache),
                heads=6,
                positions=positions,
                q_weight=weights[0],
                k_weight=weights[1],
                norm_offset=1.0,
                interleaved=interleaved,
            )
            for function, (k_cache, v_cache) in zip(
                (elementwise.rope_store, reference.rope_store), caches, strict=True
            )
        ]
        close(*queries)
        expected = [torch.zeros_like(cache) for cache in caches[1]]
        stored = [cache.transpose(1, 2).reshape(9 * block_size, 2, -1).contiguous() for cache in caches[1]]
        attention.store_kv(*stored, *expected, torch.arange(9 * block_size))
        close(caches[0][0], expected[0])
        assert torch.equal(caches[0][1], expected[1])


def test_a_negative_slot_stores_nothing(isa: InstructionSet) -> None:
    cache = [torch.zeros(1, 1, 16, 16) for _ in range(2)]
    qkv = torch.ones(2, 3 * 16)
    query = elementwise.rope_store(qkv, None, None, torch.tensor([-1, 3]), *cache, heads=1)
    assert torch.equal(query, torch.ones(2, 1, 16))
    for each in cache:
        assert each[0, 0].sum(-1).tolist() == [16.0 if place == 3 else 0.0 for place in range(16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("value_size", [40, 64])
def test_values_are_normed_on_their_way_into_the_cache(
    isa: InstructionSet, dtype: torch.dtype, tokens: int, value_size: int
) -> None:
    qkv = torch.randn(tokens, 8 * 64 + 2 * value_size).to(dtype)
    slots = torch.randperm(9 * 16)[:tokens]
    plain, normed = ([torch.zeros(9, 2, 16, n, dtype=dtype) for n in (64, value_size)] for _ in range(2))
    query = elementwise.rope_store(qkv, None, None, slots, *normed, heads=6, eps=1e-2, value_norm=True)
    assert torch.equal(query, elementwise.rope_store(qkv, None, None, slots, *plain, heads=6))
    assert torch.equal(normed[0], plain[0])
    values = qkv[:, 8 * 64 :].reshape(tokens, 2, value_size)
    wanted = reference.rms_norm(values, torch.ones(value_size, dtype=dtype), 1e-2)
    expected = [torch.zeros_like(cache) for cache in normed]
    attention.store_kv(qkv[:, 6 * 64 : 8 * 64].reshape(tokens, 2, 64).contiguous(), wanted, *expected, slots)
    close(normed[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_queries_alone_store_nothing(isa: InstructionSet, dtype: torch.dtype) -> None:
    query, weight = torch.randn(7, 6 * 64).to(dtype), torch.randn(64).to(dtype)
    angles = torch.randn(2, 7, 32)
    cache = [torch.full((2, 2, 16, 64), 7.0, dtype=dtype) for _ in range(2)]
    found, wanted = (
        function(query, *angles, torch.arange(7), *cache, heads=6, q_weight=weight, stores=False)
        for function in (elementwise.rope_store, reference.rope_store)
    )
    close(found, wanted)
    assert all(bool((each == 7.0).all()) for each in cache)
    with pytest.raises(ValueError, match="qkv"):
        elementwise.rope_store(query, *angles, torch.arange(7), *cache, heads=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (17, 1), (576, 1), (16, 5), (20, 3)])
def test_norms_with_the_sum_after_them(
    isa: InstructionSet, dtype: torch.dtype, rows: int, size: int, groups: int
) -> None:
    x, residual = (torch.randn(rows, size * groups).to(dtype) for _ in range(2))
    weight = torch.randn(size).to(dtype)
    for offset, scale in ((0.0, 1.0), (1.0, 0.3)):
        arguments = (x, weight, 1e-5, offset, residual, scale)
        close(elementwise.norm_add(*arguments), reference.norm_add(*arguments))
    normed = torch.cat(
        [elementwise.rms_norm(part.contiguous(), weight, 1e-5) for part in x.split(size, dim=1)], dim=1
    )
    assert torch.equal(elementwise.norm_add(x, weight, 1e-5, 0.0, residual), residual + normed)
    with pytest.raises(ValueError, match="aren't groups"):
        elementwise.norm_add(x, torch.ones(size * groups + 1, dtype=dtype), 1e-5, 0.0, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width", "start"), [(0, 8, 0), (1, 1, 2), (3, 17, 5), (40, 64, 64)])
def test_activated_times_some_columns(
    isa: InstructionSet, dtype: torch.dtype, activation: str, rows: int, width: int, start: int
) -> None:
    x, other = torch.randn(rows, width).to(dtype), torch.randn(rows, start + width + 3).to(dtype)
    wanted = reference.act_mul(x, other, start, activation)
    close(elementwise.act_mul(x, other, start, activation), wanted)
    with pytest.raises(ValueError, match="have no"):
        elementwise.act_mul(x, other, start + 4, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 576])
def test_embedding(isa: InstructionSet, dtype: torch.dtype, size: int) -> None:
    table = torch.randn(50, size).to(dtype)
    for count in (0, 1, 700):
        ids = torch.arange(count) * 7 % 50
        assert torch.equal(elementwise.embedding(table, ids), table[ids])


def test_what_does_not_fit_is_refused(isa: InstructionSet) -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="weight"):
        elementwise.rms_norm(x, torch.zeros(9), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        elementwise.add_rms_norm(x, torch.zeros(3, 8), torch.zeros(8), 1e-6)
    cache, angles = torch.zeros(1, 1, 16, 8), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="rotary"):
        elementwise.rope_store(
            torch.zeros(2, 24), angles, angles, torch.zeros(2).long(), cache, cache, heads=1
        )

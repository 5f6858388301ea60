"""Norms, activation·mul, RoPE and the KV store under Triton's interpreter, against kernels/reference.py."""

from __future__ import annotations

import os
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu.cases import poisoned, relative_error
from tokenmill.kernels.gpu.jit import FP8

CPU = torch.device("cpu")

# exp saturates to infinity where the functions are flat; numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
# The interpreter truncates where the chip rounds to nearest.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (1, 576), (5, 2048), (3, 33)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, offset: float) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    out = poisoned(*shape, dtype=dtype, device=CPU)
    assert gpu.rms_norm(x, weight, 1e-5, offset, out=out) is out
    assert relative_error(out, reference.rms_norm(x, weight, 1e-5, offset)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (1, 576), (5, 200)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1])
    normed, total = gpu.add_rms_norm(x, residual, weight, 1e-6)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert relative_error(normed, expected_normed) < TOLERANCE[dtype]
    assert relative_error(total, expected_total) < TOLERANCE[dtype]


def test_add_rms_norm_in_place_and_strided() -> None:
    wide = random(4, 96)
    x, residual, weight = wide[:, :64], random(4, 64, seed=1), random(64)
    expected_normed, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    normed, total = gpu.add_rms_norm(x, residual, weight, 1e-6, total=residual)
    assert total is residual
    assert relative_error(normed, expected_normed) < 1e-6
    assert relative_error(residual, expected_total) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "groups"), [(0, 16, 1), (1, 576, 1), (5, 33, 3), (2, 1100, 2)])
def test_norm_add(rows: int, size: int, groups: int, dtype: torch.dtype) -> None:
    x, residual = (random(rows, size * groups, dtype=dtype, seed=i) for i in (0, 1))
    weight = random(size, dtype=dtype, seed=2)
    for offset, scale in ((0.0, 1.0), (1.0, 0.3)):
        arguments = (x, weight, 1e-5, offset, residual, scale)
        assert relative_error(gpu.norm_add(*arguments), reference.norm_add(*arguments)) < TOLERANCE[dtype]
    with pytest.raises(ValueError, match="aren't sums"):
        gpu.norm_add(x, random(size * groups + 1, dtype=dtype), 1e-5, 0.0, residual)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "start"), [(0, 8, 0), (1, 1, 2), (3, 1025, 5), (2, 64, 64)])
def test_act_mul(rows: int, width: int, start: int, dtype: torch.dtype, activation: str) -> None:
    x, other = random(rows, width, dtype=dtype), random(rows, start + width + 3, dtype=dtype, seed=1)
    wanted = reference.act_mul(x, other, start, activation)
    assert relative_error(gpu.act_mul(x, other, start, activation), wanted) < TOLERANCE[dtype]
    with pytest.raises(ValueError, match="have no"):
        gpu.act_mul(x, other, start + 4, activation)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 2 * 1025), (2, 2 * 1024)])
def test_activation_mul(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    gate_up = random(*shape, dtype=dtype) * 4
    out = poisoned(shape[0], shape[1] // 2, dtype=dtype, device=CPU)
    gpu.activation_mul(gate_up, activation, out=out)
    assert relative_error(out, reference.activation_mul(gate_up, activation)) < TOLERANCE[dtype]


def test_activation_is_checked() -> None:
    with pytest.raises(ValueError, match="silu, gelu"):
        gpu.activation_mul(random(1, 4), "relu")


def caches(
    kv_heads: int, size: int, value_size: int, dtype: torch.dtype, block: int = 16
) -> tuple[Tensor, Tensor]:
    return (
        poisoned(4, kv_heads, block, size, dtype=dtype, device=CPU),
        poisoned(4, kv_heads, block, value_size, dtype=dtype, device=CPU),
    )


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(("kv_heads", "size", "value_size"), [(1, 64, 64), (5, 80, 80), (3, 192, 128)])
def test_store_kv(tokens: int, kv_heads: int, size: int, value_size: int, dtype: torch.dtype) -> None:
    key = random(tokens, kv_heads + 1, size, dtype=dtype)[:, 1:]
    value = random(tokens, kv_heads, value_size, dtype=dtype, seed=1)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:tokens]
    mine, theirs = caches(kv_heads, size, value_size, dtype), caches(kv_heads, size, value_size, dtype)
    if tokens > 1:
        slots[1] = -1
    gpu.store_kv(key, value, *mine, slots)
    kept = slots >= 0
    reference.store_kv(key[kept], value[kept], *theirs, slots[kept])
    assert torch.equal(bits(mine[0]), bits(theirs[0]))
    assert torch.equal(bits(mine[1]), bits(theirs[1]))


def test_store_kv_fp8_scales_and_saturates() -> None:
    exact = torch.tensor([0.5, -1.0, 1.25, 448.0, -448.0, 0.0, 2.0, 14.0]).repeat(8)
    key = (exact * 0.5).reshape(1, 1, 64)
    value = torch.full((1, 1, 64), 1e6)
    k_cache, v_cache = caches(1, 64, 64, FP8)
    gpu.store_kv(key, value, k_cache, v_cache, torch.tensor([18]), k_scale=0.5, v_scale=2.0)
    assert torch.equal(k_cache[1, 0, 2].float(), exact)
    assert torch.equal(v_cache[1, 0, 2].float(), torch.full((64,), 448.0))
    assert torch.isnan(k_cache[0].float()).all()


ROPE_CASES = [
    # heads, KV heads, D, E, rotary W, interleaved, norm
    (4, 2, 64, 64, 32, False, False),
    (9, 3, 64, 64, 32, False, True),
    (2, 1, 80, 80, 16, False, False),
    (5, 5, 96, 96, 48, True, False),
    (4, 2, 192, 128, 32, True, True),
    (3, 1, 256, 256, 64, False, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "d", "e", "half", "interleaved", "norm"), ROPE_CASES)
def test_rope_store(
    heads: int, kv_heads: int, d: int, e: int, half: int, interleaved: bool, norm: bool, dtype: torch.dtype
) -> None:
    tokens = 5
    qkv = random(tokens, heads * d + kv_heads * (d + e), dtype=dtype)
    angles = random(40, half, seed=3)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([0, 39, 7, 7, 12])
    slots = torch.tensor([0, 63, -1, 17, 16])
    weights = (random(d, seed=4), random(d, seed=5)) if norm else (None, None)
    k_cache, v_cache = caches(kv_heads, d, e, dtype)
    query = gpu.rope_store(
        qkv, cos, sin, slots, k_cache, v_cache, heads=heads, positions=positions,
        q_weight=weights[0], k_weight=weights[1], eps=1e-5, norm_offset=1.0, interleaved=interleaved,
    )  # fmt: skip

    q, k, v = qkv.split([heads * d, kv_heads * d, kv_heads * e], dim=-1)
    q, k = q.reshape(tokens, heads, d), k.reshape(tokens, kv_heads, d)
    if weights[0] is not None and weights[1] is not None:
        q = reference.rms_norm(q, weights[0], 1e-5, 1.0)
        k = reference.rms_norm(k, weights[1], 1e-5, 1.0)
    q = reference.rope(q, cos[positions], sin[positions], interleaved)
    k = reference.rope(k, cos[positions], sin[positions], interleaved)
    expected = caches(kv_heads, d, e, dtype)
    kept = slots >= 0
    reference.store_kv(k[kept], v.reshape(tokens, kv_heads, e)[kept], *expected, slots[kept])
    assert relative_error(query, q) < TOLERANCE[dtype]
    assert relative_error(k_cache, expected[0]) < TOLERANCE[dtype]
    assert torch.equal(bits(v_cache), bits(expected[1]))
    rows = gpu.rope_store(
        qkv, cos[positions], sin[positions], slots, k_cache, v_cache, heads=heads,
        q_weight=weights[0], k_weight=weights[1], eps=1e-5, norm_offset=1.0, interleaved=interleaved,
    )  # fmt: skip
    assert torch.equal(bits(rows), bits(query))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("e", [32, 80])
def test_rope_store_norms_values(e: int, dtype: torch.dtype) -> None:
    qkv, angles = random(5, 6 * 64 + 2 * e, dtype=dtype), random(5, 32, seed=3)
    slots = torch.tensor([0, 63, -1, 17, 16])
    plain, normed = caches(2, 64, e, dtype), caches(2, 64, e, dtype)
    gpu.rope_store(qkv, angles, angles, slots, *plain, heads=4)
    gpu.rope_store(qkv, angles, angles, slots, *normed, heads=4, eps=1e-2, value_norm=True)
    assert torch.equal(bits(normed[0]), bits(plain[0]))
    expected, kept = caches(2, 64, e, dtype), slots >= 0
    values = reference.rms_norm(qkv[:, 6 * 64 :].reshape(5, 2, e), torch.ones(e, dtype=dtype), 1e-2)
    keys = qkv[:, 4 * 64 : 6 * 64].reshape(5, 2, 64)
    reference.store_kv(keys[kept], values[kept], *expected, slots[kept])
    assert relative_error(normed[1], expected[1]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_of_queries_alone_stores_nothing(dtype: torch.dtype) -> None:
    query, weight, angles = random(5, 6 * 64, dtype=dtype), random(64, dtype=dtype, seed=1), random(2, 5, 32)
    cache = caches(2, 64, 64, dtype)
    before = [each.clone() for each in cache]
    found, wanted = (
        function(query, *angles, torch.arange(5), *cache, heads=6, q_weight=weight, stores=False)
        for function in (gpu.rope_store, reference.rope_store)
    )
    assert relative_error(found, wanted) < TOLERANCE[dtype]
    for each, old in zip(cache, before, strict=True):
        assert torch.equal(bits(each), bits(old))


def test_rope_store_refuses_a_wrong_width() -> None:
    k_cache, v_cache = caches(1, 64, 64, torch.float32)
    angles, slots = torch.ones(1, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="qkv rows hold 100 values"):
        gpu.rope_store(random(1, 100), angles, angles, slots, k_cache, v_cache, heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_copy_blocks(dtype: torch.dtype) -> None:
    k_cache, v_cache = (random(6, 3, 16, d, seed=d).to(dtype) for d in (80, 64))
    source, target = torch.tensor([5, -1, 0]), torch.tensor([2, 3, 4])
    expected = k_cache.clone(), v_cache.clone()
    reference.copy_blocks(*(cache.view(torch.uint8) for cache in expected), source[[0, 2]], target[[0, 2]])
    gpu.copy_blocks(k_cache, v_cache, source, target)
    gpu.copy_blocks(k_cache, v_cache, source[:0], target[:0])
    assert torch.equal(bits(k_cache), bits(expected[0]))
    assert torch.equal(bits(v_cache), bits(expected[1]))


def test_cpu_tensors_are_refused_and_a_missing_triton_is_one_line() -> None:
    """In a process of its own, where neither the interpreter nor Triton is there."""
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from tokenmill.kernels import gpu
assert not gpu.available()
try:
    gpu.rms_norm
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "the GPU kernels need Triton: pip install 'tokenmill[gpu]'"

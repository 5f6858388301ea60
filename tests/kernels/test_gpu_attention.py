"""Paged attention under Triton's interpreter: against the reference, and its rows against each other."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu import attention_decode
from tokenmill.kernels.gpu.attention_decode import make_decode_plan, plan_decode
from tokenmill.kernels.gpu.cases import PagedCase, paged_case, poisoned, relative_error
from tokenmill.kernels.gpu.jit import FP8

CPU = torch.device("cpu")
# bfloat16 and fp8 leave the interpreter truncated where the chip rounds to nearest.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

# heads, KV heads, D, E, block size, window, softcap, sinks
SHAPES = [
    (4, 2, 64, 64, 16, 0, 0.0, False),
    (3, 3, 80, 80, 16, 40, 0.0, True),
    (6, 2, 96, 96, 32, 0, 30.0, False),
    (20, 1, 128, 128, 64, 100, 20.0, True),
    (2, 1, 192, 128, 16, 0, 0.0, False),
    (2, 2, 256, 256, 16, 17, 50.0, False),
]

EXACT = [(*shape, torch.float32) for shape in SHAPES]
ROUNDED = [
    (*shape, dtype)
    for shape, dtype in zip(SHAPES[::2], [torch.bfloat16, torch.float16, torch.bfloat16], strict=True)
]


def settings(case: PagedCase, window: int, softcap: float, sinks: bool) -> dict[str, object]:
    heads, size = case.query.shape[1:]
    values = torch.randn(heads, generator=torch.Generator().manual_seed(9))
    return {
        "scale": size**-0.5,
        "window": window,
        "softcap": softcap,
        "sinks": values if sinks else None,
    }


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "e", "block", "window", "softcap", "sinks", "dtype"), EXACT + ROUNDED
)
def test_decode(
    heads: int, kv_heads: int, d: int, e: int, block: int, window: int, softcap: float, sinks: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(d + window)
    lengths = [1, block - 1, block, block + 1, 63, 64, 65, 131]
    case = paged_case(
        generator, lengths, [1] * len(lengths), heads=heads, kv_heads=kv_heads, size=d, value_size=e,
        block=block, dtype=dtype,
    )  # fmt: skip
    keywords = settings(case, window, softcap, sinks)
    out = poisoned(len(lengths), heads, e, dtype=dtype, device=CPU)
    gpu.paged_attention_decode(*case.arguments[:5], **keywords, out=out)
    assert relative_error(out, reference.paged_attention(*case.arguments, **keywords)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "e", "block", "window", "softcap", "sinks", "dtype"), EXACT + ROUNDED
)
def test_prefill(
    heads: int, kv_heads: int, d: int, e: int, block: int, window: int, softcap: float, sinks: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(d + window + 1)
    lengths, queries = [70, 5, 1, 64, 90, 33], [70, 0, 1, 31, 5, 1]
    case = paged_case(
        generator, lengths, queries, heads=heads, kv_heads=kv_heads, size=d, value_size=e, block=block,
        dtype=dtype,
    )  # fmt: skip
    keywords = settings(case, window, softcap, sinks)
    out = poisoned(sum(queries), heads, e, dtype=dtype, device=CPU)
    gpu.paged_attention_prefill(*case.arguments, **keywords, out=out)
    assert relative_error(out, reference.paged_attention(*case.arguments, **keywords)) < TOLERANCE[dtype]


@pytest.mark.parametrize("decodes", [0, 2, 3])
def test_mixed_batch(decodes: int) -> None:
    generator = torch.Generator().manual_seed(decodes)
    case = paged_case(generator, [90, 17, 40], [1, 1, 1 if decodes == 3 else 9], heads=4, kv_heads=2, size=64)
    out = gpu.paged_attention(*case.arguments, scale=0.125, decodes=decodes)
    assert relative_error(out, reference.paged_attention(*case.arguments, scale=0.125)) < 2e-6


@pytest.mark.parametrize("decode", [True, False])
def test_fp8_cache(decode: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    queries = [1, 1] if decode else [3, 40]
    case = paged_case(
        generator, [67, 40], queries, heads=8, kv_heads=2, size=64, dtype=torch.bfloat16, cache_dtype=FP8
    )
    wide = dataclasses.replace(case, k_cache=case.k_cache.float() * 0.5, v_cache=case.v_cache.float() * 2.0)
    kernel = gpu.paged_attention_decode if decode else gpu.paged_attention_prefill
    arguments = case.arguments[: 5 if decode else 6]
    out = kernel(*arguments, scale=0.125, k_scale=0.5, v_scale=2.0)
    assert relative_error(out, reference.paged_attention(*wide.arguments, scale=0.125)) < 1.2e-2


def decode_case(seed: int, lengths: list[int]) -> PagedCase:
    generator = torch.Generator().manual_seed(seed)
    return paged_case(generator, lengths, [1] * len(lengths), heads=4, kv_heads=2, size=64)


def test_padded_rows_are_zero_and_empty_batches_are_nothing() -> None:
    case = decode_case(0, [0, 33, 0])
    out = gpu.paged_attention_decode(*case.arguments[:5], scale=0.125)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 4, 64))
    one = dataclasses.replace(case, query=case.query[:0], seq_lens=case.seq_lens[:0])
    assert gpu.paged_attention_decode(*one.arguments[:5], scale=0.125).shape == (0, 4, 64)
    starts = torch.zeros(4, dtype=torch.int32)
    untouched = poisoned(3, 4, 64, dtype=torch.float32, device=CPU)
    gpu.paged_attention_prefill(*case.arguments[:5], starts, scale=0.125, out=untouched)
    assert untouched.isnan().all()


def test_a_row_is_the_same_alone_in_a_crowd_and_however_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    case = decode_case(1, [150, 5, 4200, 64])
    outputs = []
    for tokens in (64, 4096):
        monkeypatch.setattr(attention_decode, "item_tokens", lambda *_, tokens=tokens: tokens)
        outputs.append(gpu.paged_attention_decode(*case.arguments[:5], scale=0.125))
    alone = [
        gpu.paged_attention_decode(
            case.query[row : row + 1], case.k_cache, case.v_cache, case.block_table[row : row + 1],
            case.seq_lens[row : row + 1], scale=0.125,
        )
        for row in range(4)
    ]  # fmt: skip
    outputs.append(torch.cat(alone))
    assert relative_error(outputs[0], reference.paged_attention(*case.arguments, scale=0.125)) < 2e-6
    for other in outputs[1:]:
        assert torch.equal(bits(other), bits(outputs[0]))


@pytest.mark.parametrize("capacity", [0, 4, 500])
def test_a_full_workspace_costs_time_and_nothing_else(capacity: int) -> None:
    case = decode_case(2, [300, 130])
    expected = gpu.paged_attention_decode(*case.arguments[:5], scale=0.125)
    plan = make_decode_plan(2, 4, 2, 64, 64, torch.float32, CPU, capacity=capacity)
    plan_decode(plan, case.seq_lens)
    for _ in range(2):
        out = gpu.paged_attention_decode(*case.arguments[:5], scale=0.125, plan=plan)
        assert torch.equal(bits(out), bits(expected))
        assert not plan.done.any()


def test_a_plan_is_refilled_and_checked() -> None:
    plan = make_decode_plan(3, 4, 2, 64, 64, torch.float32, CPU, window=32)
    for seed, lengths in enumerate(([1, 100, 33], [200, 0, 65], [31, 32])):
        case = decode_case(seed, lengths)
        plan_decode(plan, case.seq_lens)
        out = gpu.paged_attention_decode(*case.arguments[:5], scale=0.125, window=32, plan=plan)
        expected = reference.paged_attention(*case.arguments, scale=0.125, window=32)
        real = case.seq_lens > 0
        assert relative_error(out[real], expected[real]) < 2e-6
    with pytest.raises(ValueError, match="window 32"):
        gpu.paged_attention_decode(*case.arguments[:5], scale=0.125, plan=plan)


@pytest.mark.parametrize("window", [0, 25])
def test_prefill_is_the_same_however_the_prompt_is_cut(window: int) -> None:
    case = paged_case(torch.Generator().manual_seed(3), [130], [130], heads=4, kv_heads=2, size=64)
    whole = gpu.paged_attention_prefill(*case.arguments, scale=0.125, window=window)
    for cuts in ([0, 1, 40, 130], [0, 64, 130]):
        parts = [
            gpu.paged_attention_prefill(
                case.query[begin:end], case.k_cache, case.v_cache, case.block_table,
                torch.tensor([end], dtype=torch.int32), torch.tensor([0, end - begin], dtype=torch.int32),
                scale=0.125, window=window,
            )
            for begin, end in pairwise(cuts)
        ]  # fmt: skip
        assert torch.equal(bits(torch.cat(parts)), bits(whole))

"""Attention over the paged cache, and what fills the cache: rope, stores, copies of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu.cases import PagedCase, paged_case, poisoned, relative_error
from tokenmill.kernels.gpu.jit import FP8, multiprocessors
from tokenmill.kernels.gpu.selfcheck.trial import TOLERANCE, CheckResult, Trial, differing, label


def rope_store(trial: Trial) -> Iterator[CheckResult]:
    """Norm, rope and store in one pass, the store alone, and copies of blocks."""
    shapes = (
        (8, 2, 128, 128, 64, False, False),
        (5, 5, 80, 80, 16, True, True),
        (4, 2, 192, 128, 32, False, True),
    )
    for dtype in trial.dtypes:
        for heads, kv_heads, d, e, half, interleaved, norm in shapes:
            tokens, blocks = trial.rows, trial.rows // 8 + 2
            qkv = trial.randn(tokens, heads * d + kv_heads * (d + e), dtype=dtype)
            angles = trial.randn(tokens, half)
            weight = trial.randn(d, dtype=dtype) if norm else None
            order = torch.randperm(blocks * 16, generator=trial.generator)
            slots = order[:tokens].to(trial.device)
            slots[0] = -1
            caches = [poisoned(blocks, kv_heads, 16, w, dtype=dtype, device=trial.device) for w in (d, e)]
            expected = [cache.clone() for cache in caches]
            query = gpu.rope_store(
                qkv, angles.cos(), angles.sin(), slots, *caches,
                heads=heads, q_weight=weight, k_weight=weight, interleaved=interleaved,
            )  # fmt: skip
            q, k, v = torch.split(qkv, [heads * d, kv_heads * d, kv_heads * e], dim=-1)
            q, k = q.reshape(tokens, heads, d), k.reshape(tokens, kv_heads, d)
            if weight is not None:
                q, k = reference.rms_norm(q, weight, 1e-6), reference.rms_norm(k, weight, 1e-6)
            q = reference.rope(q, angles.cos(), angles.sin(), interleaved)
            k = reference.rope(k, angles.cos(), angles.sin(), interleaved)
            v = v.reshape(tokens, kv_heads, e)
            reference.store_kv(k[1:], v[1:], expected[0], expected[1], slots[1:])
            error = max(relative_error(query, q), *map(relative_error, caches, expected))
            name = label("rope_store", dtype, f"{heads}/{kv_heads} heads of {d}")
            yield CheckResult(name, error, TOLERANCE[dtype])
            caches = [poisoned(blocks, kv_heads, 16, w, dtype=dtype, device=trial.device) for w in (d, e)]
            gpu.store_kv(k, v, caches[0], caches[1], slots)
            source, target = trial.randint(0, 1, 1), trial.randint(1, blocks, 1)
            gpu.copy_blocks(caches[0], caches[1], source, target)
            reference.copy_blocks(expected[0], expected[1], source, target)
            error = max(map(relative_error, caches, expected))
            yield CheckResult(label("store_kv, copy_blocks", dtype, f"of {d}"), error, TOLERANCE[dtype])


# heads, KV heads, D, E, block size, window, softcap, sinks
_ATTENTION: list[tuple[int, int, int, int, int, int, float, bool]] = [
    (8, 2, 64, 64, 16, 0, 0.0, False),
    (8, 1, 512, 512, 16, 0, 0.0, False),
    (3, 3, 80, 80, 16, 100, 0.0, True),
    (9, 3, 96, 96, 32, 0, 30.0, False),
    (32, 8, 128, 128, 16, 0, 0.0, False),
    (20, 1, 128, 128, 64, 70, 20.0, True),
    (4, 4, 192, 128, 16, 0, 0.0, False),
    (8, 4, 256, 256, 16, 33, 50.0, False),
]


def paged_attention(trial: Trial) -> Iterator[CheckResult]:
    """Decodes and prefills of every shape, with lengths around the borders of blocks."""
    for dtype in trial.dtypes:
        for heads, kv_heads, d, e, block, window, softcap, sinks in _ATTENTION[trial.shapes]:
            keywords: dict[str, Any] = {
                "scale": d**-0.5,
                "window": window,
                "softcap": softcap,
                "sinks": trial.randn(heads) if sinks else None,
            }
            lengths = [1, block - 1, block, block + 1, 63, 64, 65, trial.context]
            for name, queries in (
                ("decode", [1] * len(lengths)),
                ("prefill", [1, 0, block, 3, 63, 1, 2, min(trial.context, 130)]),
            ):
                case = paged_case(
                    trial.generator, lengths, queries, heads=heads, kv_heads=kv_heads, size=d, value_size=e,
                    block=block, dtype=dtype, device=trial.device,
                )  # fmt: skip
                out = poisoned(sum(queries), heads, e, dtype=dtype, device=trial.device)
                decodes = len(lengths) if name == "decode" else 0
                gpu.paged_attention(*case.arguments, **keywords, decodes=decodes, out=out)
                expected = reference.paged_attention(*case.arguments, **keywords)
                detail = f"{heads}/{kv_heads} heads of {d}/{e}, window {window}, softcap {softcap:g}"
                error = relative_error(out, expected)
                yield CheckResult(label(f"attention, {name}", dtype, detail), error, TOLERANCE[dtype])


def fp8_cache(trial: Trial) -> Iterator[CheckResult]:
    """Attention over a cache in e4m3 with scales."""
    dtype = torch.bfloat16
    for decodes, queries in ((2, [1, 1]), (0, [7, 40])):
        case = paged_case(
            trial.generator, [trial.context, 40], queries, heads=8, kv_heads=2, size=128, dtype=dtype,
            cache_dtype=FP8, device=trial.device,
        )  # fmt: skip
        wide = PagedCase(
            case.query, case.k_cache.float() * 0.5, case.v_cache.float() * 2.0,
            case.block_table, case.seq_lens, case.query_start,
        )  # fmt: skip
        out = gpu.paged_attention(*case.arguments, scale=0.1, k_scale=0.5, v_scale=2.0, decodes=decodes)
        error = relative_error(out, reference.paged_attention(*wide.arguments, scale=0.1))
        name = f"attention, fp8 cache, {'decode' if decodes else 'prefill'}"
        yield CheckResult(name, error, TOLERANCE[dtype])


def attention_rows(trial: Trial) -> Iterator[CheckResult]:
    """Bitwise: a decode row alone and in a crowd, a prompt whole and in chunks."""
    for dtype in trial.dtypes:
        shape: dict[str, Any] = {
            "heads": 8,
            "kv_heads": 2,
            "size": 128,
            "dtype": dtype,
            "device": trial.device,
        }
        case = paged_case(trial.generator, [trial.context, 1, 64, 17], [1] * 4, **shape)
        crowd = gpu.paged_attention_decode(*case.arguments[:5], scale=0.1)
        alone = gpu.paged_attention_decode(
            case.query[:1], case.k_cache, case.v_cache, case.block_table[:1], case.seq_lens[:1], scale=0.1
        )
        yield CheckResult(label("decode: a row alone = in a crowd", dtype), differing(alone, crowd[:1]), 0.0)
        # Many rows fill the chip by themselves, so that one program walks each.
        rows = multiprocessors(trial.device) + 8
        case = paged_case(trial.generator, [trial.context] + [9] * (rows - 1), [1] * rows, **shape)
        crowd = gpu.paged_attention_decode(*case.arguments[:5], scale=0.1)
        alone = gpu.paged_attention_decode(
            case.query[:1], case.k_cache, case.v_cache, case.block_table[:1], case.seq_lens[:1], scale=0.1
        )
        different = differing(alone, crowd[:1])
        yield CheckResult(label("decode: a row split up = walked at once", dtype), different, 0.0)
        length = min(trial.context, 400)
        case = paged_case(trial.generator, [length], [length], **shape)
        whole = gpu.paged_attention_prefill(*case.arguments, scale=0.1)
        cut = length // 3
        parts = []
        for begin, end in ((0, cut), (cut, length)):
            lengths = torch.tensor([end], dtype=torch.int32, device=trial.device)
            starts = torch.tensor([0, end - begin], dtype=torch.int32, device=trial.device)
            arguments = case.query[begin:end], *case.arguments[1:4], lengths, starts
            parts.append(gpu.paged_attention_prefill(*arguments, scale=0.1))
        different = differing(torch.cat(parts), whole)
        yield CheckResult(label("prefill: whole = in chunks", dtype), different, 0.0)

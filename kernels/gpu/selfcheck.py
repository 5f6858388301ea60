"""Every kernel against its plain-torch twin, on random inputs that are new at each run.

`check_all` is what `make gpu-check` calls on a GPU, and what a test runs small under the interpreter. Outputs
are filled with NaN first and unused cache places hold NaN, so an element that is skipped, or read where it
mustn't be, shows as an infinite error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu import reference_gpu, selfcheck_fp8
from tokenmill.kernels.gpu.cases import PagedCase, paged_case, poisoned, relative_error
from tokenmill.kernels.gpu.jit import FP8, INTERPRETED

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Allowed ‖out - reference‖ / ‖reference‖, the reference's own rounding included."""

DRAW_TOLERANCE = 0.02
"""Allowed share of tokens or rows that differ where a last bit of exp or log decides (thresholds, draws)."""


@dataclass(frozen=True)
class CheckResult:
    """One comparison: a relative error, or the share of rows that differ."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class _Bench:
    """Where the inputs come from and how large they are."""

    device: torch.device
    generator: torch.Generator
    dtypes: tuple[torch.dtype, ...]
    rows: int  # rows of logits, tokens
    width: int  # hidden size
    vocabulary: int
    context: int
    attention: slice  # of the shapes below

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def _bench(device: torch.device, seed: int) -> _Bench:
    generator = torch.Generator().manual_seed(seed)
    if INTERPRETED:
        return _Bench(device, generator, (torch.bfloat16,), 3, 200, 1500, 100, slice(1, None, 3))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return _Bench(device, generator, dtypes, 33, 4096, 128256, 5000, slice(None))


def _name(kernel: str, dtype: torch.dtype, detail: str = "") -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} {detail}".strip()


def _elementwise(bench: _Bench) -> Iterator[CheckResult]:
    for dtype in bench.dtypes:
        allowed = TOLERANCE[dtype]
        for rows, width in ((1, 33), (bench.rows, bench.width)):
            x, residual = bench.randn(rows, width, dtype=dtype), bench.randn(rows, width, dtype=dtype)
            weight = bench.randn(width, dtype=dtype)
            out = poisoned(rows, width, dtype=dtype, device=bench.device)
            gpu.rms_norm(x, weight, 1e-5, 1.0, out=out)
            error = relative_error(out, reference.rms_norm(x, weight, 1e-5, 1.0))
            yield CheckResult(_name("rms_norm", dtype, f"[{rows}, {width}]"), error, allowed)
            out, total = out.fill_(float("nan")), poisoned(rows, width, dtype=dtype, device=bench.device)
            gpu.add_rms_norm(x, residual, weight, 1e-5, out=out, total=total)
            expected = reference.add_rms_norm(x, residual, weight, 1e-5)
            error = max(relative_error(out, expected[0]), relative_error(total, expected[1]))
            yield CheckResult(_name("add_rms_norm", dtype, f"[{rows}, {width}]"), error, allowed)
        for activation in ("silu", "gelu", "gelu_tanh"):
            gate_up = bench.randn(bench.rows, 2 * bench.width + 2, dtype=dtype) * 3
            out = poisoned(bench.rows, bench.width + 1, dtype=dtype, device=bench.device)
            gpu.activation_mul(gate_up, activation, out=out)
            error = relative_error(out, reference.activation_mul(gate_up, activation))
            yield CheckResult(_name(activation, dtype), error, allowed)


def _rope_store(bench: _Bench) -> Iterator[CheckResult]:
    shapes = (
        (8, 2, 128, 128, 64, False, False),
        (5, 5, 80, 80, 16, True, True),
        (4, 2, 192, 128, 32, False, True),
    )
    for dtype in bench.dtypes:
        for heads, kv_heads, d, e, half, interleaved, norm in shapes:
            tokens, blocks = bench.rows, bench.rows // 8 + 2
            qkv = bench.randn(tokens, heads * d + kv_heads * (d + e), dtype=dtype)
            angles = bench.randn(tokens, half)
            weight = bench.randn(d, dtype=dtype) if norm else None
            order = torch.randperm(blocks * 16, generator=bench.generator)
            slots = order[:tokens].to(bench.device)
            slots[0] = -1
            caches = [poisoned(blocks, kv_heads, 16, w, dtype=dtype, device=bench.device) for w in (d, e)]
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
            name = _name("rope_store", dtype, f"{heads}/{kv_heads} heads of {d}")
            yield CheckResult(name, error, TOLERANCE[dtype])
            caches = [poisoned(blocks, kv_heads, 16, w, dtype=dtype, device=bench.device) for w in (d, e)]
            gpu.store_kv(k, v, caches[0], caches[1], slots)
            source, target = bench.randint(0, 1, 1), bench.randint(1, blocks, 1)
            gpu.copy_blocks(caches[0], caches[1], source, target)
            reference.copy_blocks(expected[0], expected[1], source, target)
            error = max(map(relative_error, caches, expected))
            yield CheckResult(_name("store_kv, copy_blocks", dtype, f"of {d}"), error, TOLERANCE[dtype])


# heads, KV heads, D, E, block size, window, softcap, sinks
_ATTENTION: list[tuple[int, int, int, int, int, int, float, bool]] = [
    (8, 2, 64, 64, 16, 0, 0.0, False),
    (3, 3, 80, 80, 16, 100, 0.0, True),
    (9, 3, 96, 96, 32, 0, 30.0, False),
    (32, 8, 128, 128, 16, 0, 0.0, False),
    (20, 1, 128, 128, 64, 70, 20.0, True),
    (4, 4, 192, 128, 16, 0, 0.0, False),
    (8, 4, 256, 256, 16, 33, 50.0, False),
]


def _attention(bench: _Bench) -> Iterator[CheckResult]:
    for dtype in bench.dtypes:
        for heads, kv_heads, d, e, block, window, softcap, sinks in _ATTENTION[bench.attention]:
            keywords: dict[str, Any] = {
                "scale": d**-0.5,
                "window": window,
                "softcap": softcap,
                "sinks": bench.randn(heads) if sinks else None,
            }
            lengths = [1, block - 1, block, block + 1, 63, 64, 65, bench.context]
            for name, queries in (
                ("decode", [1] * len(lengths)),
                ("prefill", [1, 0, block, 3, 63, 1, 2, min(bench.context, 130)]),
            ):
                case = paged_case(
                    bench.generator, lengths, queries, heads=heads, kv_heads=kv_heads, size=d, value_size=e,
                    block=block, dtype=dtype, device=bench.device,
                )  # fmt: skip
                out = poisoned(sum(queries), heads, e, dtype=dtype, device=bench.device)
                decodes = len(lengths) if name == "decode" else 0
                gpu.paged_attention(*case.arguments, **keywords, decodes=decodes, out=out)
                expected = reference.paged_attention(*case.arguments, **keywords)
                detail = f"{heads}/{kv_heads} heads of {d}/{e}, window {window}, softcap {softcap:g}"
                error = relative_error(out, expected)
                yield CheckResult(_name(f"attention, {name}", dtype, detail), error, TOLERANCE[dtype])


def _fp8_cache(bench: _Bench) -> Iterator[CheckResult]:
    dtype = torch.bfloat16
    for decodes, queries in ((2, [1, 1]), (0, [7, 40])):
        case = paged_case(
            bench.generator, [bench.context, 40], queries, heads=8, kv_heads=2, size=128, dtype=dtype,
            cache_dtype=FP8, device=bench.device,
        )  # fmt: skip
        wide = PagedCase(
            case.query, case.k_cache.float() * 0.5, case.v_cache.float() * 2.0,
            case.block_table, case.seq_lens, case.query_start,
        )  # fmt: skip
        out = gpu.paged_attention(*case.arguments, scale=0.1, k_scale=0.5, v_scale=2.0, decodes=decodes)
        error = relative_error(out, reference.paged_attention(*wide.arguments, scale=0.1))
        name = f"attention, fp8 cache, {'decode' if decodes else 'prefill'}"
        yield CheckResult(name, error, TOLERANCE[dtype])


def _attention_rows(bench: _Bench) -> Iterator[CheckResult]:
    """Bitwise: a decode row alone and in a crowd, a prompt whole and in chunks."""
    for dtype in bench.dtypes:
        shape: dict[str, Any] = {
            "heads": 8,
            "kv_heads": 2,
            "size": 128,
            "dtype": dtype,
            "device": bench.device,
        }
        case = paged_case(bench.generator, [bench.context, 1, 64, 17], [1] * 4, **shape)
        crowd = gpu.paged_attention_decode(*case.arguments[:5], scale=0.1)
        alone = gpu.paged_attention_decode(
            case.query[:1], case.k_cache, case.v_cache, case.block_table[:1], case.seq_lens[:1], scale=0.1
        )
        yield CheckResult(_name("decode: a row alone = in a crowd", dtype), _differing(alone, crowd[:1]), 0.0)
        # Many rows fill the chip by themselves, so that one program walks each.
        case = paged_case(bench.generator, [bench.context] + [9] * 139, [1] * 140, **shape)
        crowd = gpu.paged_attention_decode(*case.arguments[:5], scale=0.1)
        alone = gpu.paged_attention_decode(
            case.query[:1], case.k_cache, case.v_cache, case.block_table[:1], case.seq_lens[:1], scale=0.1
        )
        differing = _differing(alone, crowd[:1])
        yield CheckResult(_name("decode: a row split up = walked at once", dtype), differing, 0.0)
        length = min(bench.context, 400)
        case = paged_case(bench.generator, [length], [length], **shape)
        whole = gpu.paged_attention_prefill(*case.arguments, scale=0.1)
        cut = length // 3
        parts = []
        for begin, end in ((0, cut), (cut, length)):
            lengths = torch.tensor([end], dtype=torch.int32, device=bench.device)
            starts = torch.tensor([0, end - begin], dtype=torch.int32, device=bench.device)
            arguments = case.query[begin:end], *case.arguments[1:4], lengths, starts
            parts.append(gpu.paged_attention_prefill(*arguments, scale=0.1))
        differing = _differing(torch.cat(parts), whole)
        yield CheckResult(_name("prefill: whole = in chunks", dtype), differing, 0.0)


def _differing(out: Tensor, expected: Tensor) -> float:
    """Share of rows that aren't equal bit for bit."""
    rows = max(1, out.shape[0])
    return float((out.flatten(1) != expected.flatten(1)).any(1).sum()) / rows


def _logits(bench: _Bench) -> Iterator[CheckResult]:
    rows, width = bench.rows, bench.vocabulary
    raw = bench.randn(rows, width) * 3
    penalties = gpu.Penalties(
        torch.arange(rows, device=bench.device) - 1,
        bench.randint(-2, 3, rows, width).clamp(min=0).int(),
        bench.rand(rows, width) < 0.3,
        bench.rand(rows) + 0.5,
        bench.randn(rows),
        bench.randn(rows),
    )
    mask = gpu.Mask(
        torch.arange(rows, device=bench.device) % 3 - 1,
        bench.randint(-(1 << 31), 1 << 31, 2, -(-width // 32)).int(),
    )
    everyone = torch.arange(rows, device=bench.device)
    bias = gpu.Bias(everyone, bench.randint(0, width, rows), bench.randn(rows))
    out = poisoned(rows, width, dtype=torch.float32, device=bench.device)
    gpu.adjust_logits(raw, bias=bias, penalties=penalties, mask=mask, out=out)
    expected = raw.clone()
    reference.apply_logit_bias(expected, bias.rows, bias.tokens, bias.values)
    reference.apply_penalties(
        expected, penalties.slots, penalties.output_counts, penalties.prompt_seen,
        penalties.repetition, penalties.presence, penalties.frequency,
    )  # fmt: skip
    masked = mask.lines >= 0
    reference.apply_bitmask(expected, everyone[masked], mask.bits[mask.lines[masked]])
    yield CheckResult("adjust_logits", relative_error(out, expected), 1e-6)
    chosen = bench.randint(0, width, rows)
    got = gpu.token_logprobs(raw, chosen, 20)
    wanted = reference.token_logprobs(raw, chosen, 20)
    yield CheckResult("token_logprobs", max(relative_error(got[i], wanted[i]) for i in (0, 2)), 1e-5)
    yield CheckResult("token_logprobs, ids", _differing(got[1], wanted[1]), 0.0)


def _draws(bench: _Bench) -> Iterator[CheckResult]:
    rows, width = bench.rows, bench.vocabulary
    high = 1 << 62
    for name, logits in (
        ("smooth", bench.randn(rows, width) * 3),
        ("ties", (bench.randn(rows, width) * 6).round() / 2),
        ("flat", bench.randn(rows, width) * 0.01),
    ):
        temperature = bench.rand(rows) + 0.3
        temperature[0] = 0.0
        settings = [
            bench.rand(rows) * 0.05 * (bench.randint(0, 2, rows) > 0),
            bench.randint(0, 3, rows) * bench.randint(1, 100, rows),
            1.0 - bench.rand(rows) * 0.5 * (bench.randint(0, 2, rows) > 0),
        ]
        scaled = logits / temperature.clamp(min=0.1)[:, None]
        kept = gpu.filter_logits(scaled, *settings) > float("-inf")
        wanted = reference.filter_logits(scaled, *settings) > float("-inf")
        yield CheckResult(f"filters, {name}", _near_sets(kept, wanted), DRAW_TOLERANCE)
        noise = [bench.randint(-high, high, rows), bench.randint(0, 1 << 17, rows)]
        drawn = gpu.sample(logits, temperature, *settings, *noise)
        expected = reference.sample(logits, temperature, *settings, *noise)
        differing = _differing(drawn[:, None], expected[:, None])
        yield CheckResult(f"sample, {name}", differing, DRAW_TOLERANCE)
        greedy = gpu.first_argmax(logits)
        expected = reference.first_argmax(logits)
        yield CheckResult(f"first_argmax, {name}", _differing(greedy[:, None], expected[:, None]), 0.0)


def _near_sets(kept: Tensor, wanted: Tensor) -> float:
    """Tokens in one set only, in parts of those kept; each row's border may go either way."""
    differing = (kept != wanted).sum(1) - 1
    return float(differing.clamp(min=0).sum()) / max(1.0, float(wanted.sum()))


def _linears(bench: _Bench) -> Iterator[CheckResult]:
    shapes = [(64, 16), (576, 33), (bench.width - bench.width % 256 or 256, 512)]
    for dtype in bench.dtypes:
        for inputs, outputs in shapes:
            for rows in (1, 3, 16, 17):
                x, weight = bench.randn(rows, inputs, dtype=dtype), bench.randn(outputs, inputs, dtype=dtype)
                bias, residual = bench.randn(outputs), bench.randn(rows, outputs, dtype=dtype)
                out = poisoned(rows, outputs, dtype=dtype, device=bench.device)
                gpu.linear(x, weight, bias=bias, residual=residual, out=out)
                expected = reference_gpu.linear(x, weight, bias=bias, residual=residual)
                detail = f"{rows} rows, {inputs} to {outputs}"
                error = relative_error(out, expected)
                yield CheckResult(_name("linear", dtype, detail), error, TOLERANCE[dtype])
                row = gpu.linear(x[:1], weight, bias=bias, residual=residual[:1])
                name = _name("linear: a row alone = in a crowd", dtype, detail)
                yield CheckResult(name, _differing(row, out[:1]), 0.0)
            for rows in (1, 2, 8):
                yield from _normed_linear(bench, rows, inputs, outputs, dtype)
        for name, quantize in _QUANTIZERS.items():
            x, quantized = bench.randn(2, 512, dtype=dtype), quantize(bench.randn(96, 512))
            for activation in (None, "silu"):
                out = gpu.linear(x, quantized, activation=activation)
                error = relative_error(out, reference_gpu.linear(x, quantized, activation=activation))
                yield CheckResult(_name(f"linear, {name}, {activation}", dtype), error, TOLERANCE[dtype])


def _normed_linear(
    bench: _Bench, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> Iterator[CheckResult]:
    """A norm inside of its product: near the twin, and to the bit what norm and product make one by one."""
    x, weight = bench.randn(rows, inputs, dtype=dtype), bench.randn(2 * outputs, inputs, dtype=dtype)
    norm = gpu.RowNorm(bench.randn(inputs, dtype=dtype), 1e-5, 1.0)
    weight *= inputs**-0.5
    for activation in (None, "silu"):
        out = gpu.linear(x, weight, activation=activation, norm=norm)
        detail = f"{rows} rows, {inputs} to {outputs}, {activation}"
        error = relative_error(out, reference_gpu.linear(x, weight, activation=activation, norm=norm))
        yield CheckResult(_name("norm in a linear", dtype, detail), error, TOLERANCE[dtype])
        normed = gpu.rms_norm(x, norm.weight, norm.eps, norm.offset)
        differing = _differing(out, gpu.linear(normed, weight, activation=activation))
        yield CheckResult(_name("norm in a linear = before it", dtype, detail), differing, 0.0)


def _fp8(bench: _Bench) -> Iterator[CheckResult]:
    inputs = 3 * bench.width + 16
    found = selfcheck_fp8.compare_with_reference(
        bench.generator, bench.device, bench.dtypes, bench.rows, inputs
    )
    return itertools.starmap(CheckResult, found)


def _fp8_crowds(bench: _Bench) -> Iterator[CheckResult]:
    found = selfcheck_fp8.compare_crowds(bench.generator, bench.device, bench.width, 4096)
    return itertools.starmap(CheckResult, found)


_QUANTIZERS: dict[str, Callable[[Tensor], Any]] = {
    "fp8": lambda weight: gpu.quantize_fp8(weight),
    "int8": lambda weight: gpu.quantize_int8(weight),
    "int4/32": lambda weight: gpu.quantize_int4(weight, 32),
    "int4/128": lambda weight: gpu.quantize_int4(weight, 128),
}


def _experts(bench: _Bench) -> Iterator[CheckResult]:
    tokens, experts, inner, width = bench.rows * 2, 8, 128, 64
    for dtype in bench.dtypes:
        x = bench.randn(tokens, width, dtype=dtype)
        router = bench.randn(tokens, experts)
        slots = torch.arange(tokens, device=bench.device) - 1
        ids, weights = gpu.route(router, 2, slots=slots)
        wanted = reference_gpu.route(router, 2, slots=slots)
        yield CheckResult(_name("route, ids", dtype), _differing(ids, wanted[0]), 0.0)
        yield CheckResult(_name("route, weights", dtype), relative_error(weights, wanted[1]), 1e-5)
        plain = bench.randn(experts, 2 * inner, width), bench.randn(experts, 72, inner)
        for name, (gate_up, down) in {
            "plain": (plain[0].to(dtype), plain[1].to(dtype)),
            "fp8": (gpu.quantize_fp8(plain[0]), gpu.quantize_fp8(plain[1])),
        }.items():
            for tile in (16, 64):
                out = poisoned(tokens, 72, dtype=dtype, device=bench.device)
                gpu.mixture(x, ids, weights, gate_up, down, "silu", tile_rows=tile, out=out)
                expected = reference_gpu.mixture(x, ids, weights, gate_up, down, "silu")
                error = relative_error(out, expected)
                what = _name(f"mixture, {name}, tiles of {tile}", dtype)
                yield CheckResult(what, error, TOLERANCE[dtype])


def _graph(bench: _Bench) -> Iterator[CheckResult]:
    """A captured decode step, replayed after lengths, tables and caches have changed under it."""
    rows, dtype = 4, torch.bfloat16
    make: dict[str, Any] = {"heads": 8, "kv_heads": 2, "size": 128, "dtype": dtype, "device": bench.device}
    first = paged_case(bench.generator, [bench.context, 1, 70, 300], [1] * rows, **make)
    second = paged_case(bench.generator, [70, bench.context, 300, 1], [1] * rows, **make)
    plan = gpu.make_decode_plan(rows, 8, 2, 128, 128, dtype, bench.device)
    out = torch.empty_like(first.query)

    def step() -> None:
        gpu.plan_decode(plan, first.seq_lens)
        gpu.paged_attention_decode(*first.arguments[:5], scale=0.1, plan=plan, out=out)

    graph = _captured(step)
    for case in (first, second):
        for mine, new in zip(first.arguments[:5], case.arguments[:5], strict=True):
            if mine is not new:
                mine.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        expected = reference.paged_attention(*first.arguments, scale=0.1)
        yield CheckResult("decode attention in a graph", relative_error(out, expected), TOLERANCE[dtype])


def _captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which runs once before so that its kernels are compiled."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _overlap(bench: _Bench) -> Iterator[CheckResult]:
    """A chain of kernels that each read the last one's result: overlapped, they must wait for it."""
    width, dtype = 1024, torch.bfloat16
    x, out = bench.randn(4, width, dtype=dtype), torch.empty(4, width, dtype=dtype, device=bench.device)
    norm = bench.randn(width, dtype=dtype)
    gate_up = bench.randn(4 * width, width, dtype=dtype) * width**-0.5
    down = bench.randn(width, 2 * width, dtype=dtype) * width**-0.5

    def step() -> None:
        last = x
        for _ in range(8):
            inner = gpu.linear(gpu.rms_norm(last, norm, 1e-5), gate_up, activation="silu")
            last = gpu.linear(inner, down, residual=last)
            inner = gpu.linear(last, gate_up, activation="silu", norm=gpu.RowNorm(norm, 1e-5))
            last = gpu.linear(inner, down, residual=last)
        out.copy_(last)

    step()
    expected = out.clone()
    with gpu.overlapping_launches(gpu.supports_overlap(bench.device)):
        graph = _captured(step)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        yield CheckResult("overlapping launches change nothing", _differing(out, expected), 0.0)


def check_groups(device: torch.device, seed: int) -> dict[str, Iterator[CheckResult]]:
    """Every check, those of a kind together and in order, on inputs drawn from `seed`.

    Small inputs under the interpreter, true sizes on a GPU. A group's checks run as its iterator is advanced.
    """
    bench = _bench(device, seed)
    checks = [
        _elementwise, _rope_store, _attention, _fp8_cache, _attention_rows, _logits, _draws, _linears,
        _fp8, _experts,
    ]  # fmt: skip
    if device.type == "cuda":
        checks += [_graph, _overlap, _fp8_crowds]
    return {check.__name__.lstrip("_"): check(bench) for check in checks}


def check_all(device: torch.device, seed: int) -> list[CheckResult]:
    """The results of all `check_groups`."""
    return [result for group in check_groups(device, seed).values() for result in group]

"""Each kernel's time on a GPU beside the limit that its bytes and operations set, measured in the same run.

A kernel is captured several times into one CUDA graph, over inputs that together exceed the L2 cache, and the
replays are timed with events: neither the host nor a warm cache flatters it. Importing this needs no GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels import gpu
from tokenmill.kernels.gpu.fp8_rows import Fp8Rows
from tokenmill.kernels.gpu.norms import RowNorm
from tokenmill.kernels.gpu.quantize import QuantizedWeight, stored

Row = dict[str, float | str]

_REPLAYS = 20
_L2_BYTES = 128 << 20
"""More than twice the L2 cache of an H200: what is touched in between has been evicted."""


@dataclass(frozen=True)
class Limits:
    """What the machine reached in this run."""

    bytes_per_second: float  # device copy, bytes read and written
    operations_per_second: float  # bfloat16 matmul, multiplications and additions
    fp8_operations_per_second: float = 0.0  # the same with both operands in e4m3; 0 where that isn't known


@dataclass(frozen=True)
class Work:
    """One thing to time: calls over inputs of their own, and what one call has to move and compute."""

    name: str
    shape: str
    calls: Sequence[Callable[[], object]]
    bytes: float
    operations: float = 0.0
    fp8: bool = False  # both operands of its products are in e4m3

    def bound(self, limits: Limits) -> float:
        """The least seconds that the machine could take for it."""
        rate = limits.fp8_operations_per_second if self.fp8 else limits.operations_per_second
        return max(self.bytes / limits.bytes_per_second, self.operations / rate if rate else 0.0)


def seconds_of(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one call, when `calls` follow each other in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(_REPLAYS + 3):
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3 / len(calls))
    return statistics.median(times[3:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure_limits(device: torch.device) -> Limits:
    """Copy 1 GiB and multiply two random 8192 x 8192 matrices in bfloat16; `fp8_matmul_rate` knows the rest."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return Limits(
        2 * source.numel() / seconds_of([lambda: target.copy_(source)]),
        2 * 8192**3 / seconds_of([lambda: torch.mm(a, b, out=out)]),
    )


def fp8_matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Operations a second of torch's product of two random matrices in e4m3; 0 where the chip has none."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return 0.0
    a, b = (gpu.quantize_rows(torch.randn(size, size, device=device, dtype=torch.bfloat16)) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds_of([_torch_product(a, b.data, b.scale, out)])


def _torch_product(x: Fp8Rows, weight: Tensor, scale: Tensor, out: Tensor) -> Callable[[], object]:
    """torch's own product of the same operands, its sums left to the matrix unit."""
    row, column = x.scale[:, None], scale[None, :]
    return lambda: torch._scaled_mm(
        x.data, weight.T, row, column, out_dtype=out.dtype, use_fast_accum=True, out=out
    )


def _copies(bytes_of_one: float) -> int:
    """How many inputs a graph needs so that none is still in the cache when its turn comes again."""
    return max(1, min(64, int(_L2_BYTES // bytes_of_one) + 1))


# outputs, inputs, activation: Llama-3.1-8B, Llama-3.2-1B and Qwen3-0.6B, and the first one's LM head
_LINEARS = (
    (6144, 4096, None), (4096, 4096, None), (28672, 4096, "silu"), (4096, 14336, None), (128256, 4096, None),
    (3072, 2048, None), (2048, 2048, None), (16384, 2048, "silu"), (2048, 8192, None),
    (4096, 1024, None), (1024, 2048, None), (6144, 1024, "silu"), (1024, 3072, None),
)  # fmt: skip


def _weights(weight: Tensor, name: str) -> list[Tensor | QuantizedWeight]:
    """Copies of `weight` as `name` holds it, so many that together they don't fit the cache."""
    one: Tensor | QuantizedWeight = weight
    if name != "bf16":
        one = gpu.quantize_fp8(weight) if name == "fp8" else gpu.quantize_int4(weight)
    copies = [one]
    for _ in range(_copies(_bytes(one)) - 1):
        data, scale, group = stored(one)
        copies.append(data.clone() if data is one else QuantizedWeight(data.clone(), scale.clone(), group))
    return copies


def _bytes(weight: Tensor | QuantizedWeight) -> float:
    data, scale, _ = stored(weight)
    return float(data.nbytes if data is weight else data.nbytes + scale.nbytes)


def _linears(device: torch.device) -> Iterator[Work]:
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    space = gpu.make_linear_workspace(device)
    for outputs, inputs, activation in _LINEARS:
        for name in ("bf16", "fp8", "int4"):
            weights = _weights(make(outputs, inputs), name)
            for rows in (1, 16, 32):
                x, out = make(rows, inputs), make(rows, outputs // (1 if activation is None else 2))
                keywords = {"activation": activation, "out": out, "workspace": space}
                calls = [partial(gpu.linear, x, weight, **keywords) for weight in weights]
                label = f"{rows} x {inputs} to {outputs}{' gated' if activation else ''}"
                moved = _bytes(weights[0]) + x.nbytes + out.nbytes
                yield Work(f"linear {name}", label, calls, moved, 2.0 * rows * inputs * outputs)


def _normed_linears(device: torch.device) -> Iterator[Work]:
    """Products of normed rows, the norm in a launch of its own and inside."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    space = gpu.make_linear_workspace(device)
    for outputs, inputs, activation in _LINEARS:
        if outputs <= inputs:
            continue  # products that read attention's or an activation's result
        weights, norm = _weights(make(outputs, inputs), "bf16"), gpu.RowNorm(make(inputs), 1e-5)
        for rows in (1, 8):
            x, out = make(rows, inputs), make(rows, outputs // (1 if activation is None else 2))
            keywords = {"activation": activation, "out": out, "workspace": space}
            apart = partial(_norm_then_linear, x, norm, keywords)
            label = f"{rows} x {inputs} to {outputs}{' gated' if activation else ''}"
            moved = _bytes(weights[0]) + x.nbytes + out.nbytes
            yield Work("norm, linear", label, [partial(apart, weight) for weight in weights], moved)
            calls = [partial(gpu.linear, x, weight, norm=norm, **keywords) for weight in weights]
            yield Work("linear with norm", label, calls, moved)


def _norm_then_linear(
    x: Tensor, norm: RowNorm, keywords: dict[str, Any], weight: Tensor | QuantizedWeight
) -> None:
    gpu.linear(gpu.rms_norm(x, norm.weight, norm.eps, norm.offset), weight, **keywords)


def _products(device: torch.device) -> Iterator[Work]:
    """From one row to a step full of them: bfloat16, 8-bit weights, 8 bits on both sides by us and by torch."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    eight = torch.cuda.get_device_capability(device) >= (8, 9)
    for outputs, inputs in ((4096, 4096), (28672, 4096), (4096, 14336)):
        plain = [stored(weight)[0] for weight in _weights(make(outputs, inputs), "bf16")]
        rounded = [stored(weight) for weight in _weights(make(outputs, inputs), "fp8")] if eight else []
        weights = [gpu.QuantizedWeight(*parts) for parts in rounded]
        for rows in (1, 32, 256, 2048):
            x, out = make(rows, inputs), make(rows, outputs)
            shape, operations = f"{rows} x {inputs} to {outputs}", 2.0 * rows * inputs * outputs
            work = partial(Work, shape=shape, operations=operations)
            calls: Sequence[Callable[[], object]] = [partial(torch.mm, x, w.T, out=out) for w in plain]
            yield work("product bf16, torch", calls=calls, bytes=plain[0].nbytes + x.nbytes + out.nbytes)
            if not eight:
                continue
            calls = [partial(gpu.linear, x, weight, out=out) for weight in weights]
            yield work("product fp8 x bf16", calls=calls, bytes=_bytes(weights[0]) + x.nbytes + out.nbytes)
            codes, moved = gpu.quantize_rows(x), _bytes(weights[0]) + x.nbytes / 2 + out.nbytes
            calls = [partial(gpu.fp8_linear, codes, weight, out=out) for weight in weights]
            yield work("product fp8 x fp8", calls=calls, bytes=moved, fp8=True)
            calls = [_torch_product(codes, data, scale, out) for data, scale, _ in rounded]
            yield work("product fp8 x fp8, torch", calls=calls, bytes=moved, fp8=True)
            calls = [partial(gpu.quantize_rows, x, out=codes)]
            yield Work("quantize_rows", f"{rows} x {inputs}", calls, 1.5 * x.nbytes)


def _decode_attention(device: torch.device) -> Iterator[Work]:
    heads, kv_heads, size, block, dtype = 32, 8, 128, 16, torch.bfloat16
    make = partial(torch.randn, device=device, dtype=dtype)
    for rows, context in ((1, 1024), (1, 8192), (1, 131072), (16, 2048), (64, 1024), (256, 1024)):
        blocks = context // block
        shape = (rows * blocks, kv_heads, block, size)
        moved = 2.0 * rows * context * kv_heads * size * dtype.itemsize
        caches = [(make(shape), make(shape)) for _ in range(_copies(moved))]
        table = torch.randperm(rows * blocks, device=device).int().view(rows, blocks)
        lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        plan = gpu.make_decode_plan(rows, heads, kv_heads, size, size, dtype, device)
        gpu.plan_decode(plan, lengths)
        query, out = make(rows, heads, size), make(rows, heads, size)
        decode = partial(gpu.paged_attention_decode, scale=0.1, plan=plan, out=out)
        calls = [partial(decode, query, *cache, table, lengths) for cache in caches]
        operations = 4.0 * rows * context * heads * size
        yield Work("attention, decode", f"{rows} rows of {context}", calls, moved, operations)


def _prefill_attention(device: torch.device) -> Iterator[Work]:
    heads, kv_heads, size, block = 32, 8, 128, 16
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for rows, length in ((1, 1024), (1, 8192), (8, 1024)):
        blocks = length // block
        k, v = (make(rows * blocks, kv_heads, block, size) for _ in range(2))
        query, out = make(rows * length, heads, size), make(rows * length, heads, size)
        table = torch.arange(rows * blocks, device=device).int().view(rows, blocks)
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        starts = (torch.arange(rows + 1, device=device) * length).int()
        plan = gpu.plan_prefill(query, k, v, starts)
        arguments = query, k, v, table, lengths, starts
        prefill = partial(gpu.paged_attention_prefill, *arguments, scale=0.1, plan=plan, out=out)
        operations = 2.0 * rows * length * length * heads * size
        moved = 2.0 * query.nbytes + 2.0 * k.nbytes
        yield Work("attention, prefill", f"{rows} x {length}", [prefill], moved, operations)


def _rows_and_cache(device: torch.device) -> Iterator[Work]:
    heads, kv_heads, size, hidden = 32, 8, 128, 4096
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for rows in (1, 256, 8192):
        x, residual, out, weight = make(rows, hidden), make(rows, hidden), make(rows, hidden), make(hidden)
        norm = partial(gpu.add_rms_norm, x, residual, weight, 1e-5, out=out, total=residual)
        yield Work("add_rms_norm", f"{rows} x {hidden}", [norm], 4.0 * x.nbytes)
        qkv, angles = make(rows, (heads + 2 * kv_heads) * size), make(rows, size // 2).float()
        caches = [make(rows // 16 + 1, kv_heads, 16, size) for _ in range(2)]
        slots, query = torch.arange(rows, device=device), make(rows, heads, size)
        rope = partial(gpu.rope_store, qkv, angles, angles, slots, *caches, heads=heads, out=query)
        yield Work("rope_store", f"{rows} rows", [rope], 2.0 * qkv.nbytes + 2.0 * angles.nbytes)


def _sampler(device: torch.device) -> Iterator[Work]:
    width = 128256
    for rows in (1, 32, 256):
        logits, ones = torch.randn(rows, width, device=device) * 3, torch.ones(rows, device=device)
        zeros, longs = torch.zeros_like(ones), torch.zeros(rows, dtype=torch.int64, device=device)
        space = gpu.make_sampling_workspace(rows, width, device)
        for name, top_k, top_p in (("plain", 0, 1.0), ("top_k and top_p", 50, 0.9), ("top_p", 0, 0.95)):
            settings = zeros, torch.full_like(longs, top_k), torch.full_like(ones, top_p), longs, longs
            sample = partial(
                gpu.sample, filtered=name != "plain", workspace=space, out=torch.empty_like(longs)
            )
            calls = [partial(sample, logits, ones, *settings)]
            yield Work(f"sample, {name}", f"{rows} x {width}", calls, float(logits.nbytes))
        logprobs_space = gpu.make_logprobs_workspace(rows, width, device)
        calls = [partial(gpu.token_logprobs, logits, longs, 5, workspace=logprobs_space)]
        yield Work("token_logprobs, 5 best", f"{rows} x {width}", calls, float(logits.nbytes))


KINDS: dict[str, Callable[[torch.device], Iterator[Work]]] = {
    "linears": _linears,
    "linears with norms": _normed_linears,
    "decode attention": _decode_attention,
    "prefill attention": _prefill_attention,
    "rows and cache": _rows_and_cache,
    "sampler": _sampler,
    "8-bit products": _products,
}


def rehearse(device: torch.device, overlap: bool = False) -> None:
    """Call each kernel once as `measure` does, whatever becomes of it: for `compile_ahead`."""
    for make in KINDS.values():
        for work in make(device):
            with suppress(Exception), gpu.overlapping_launches(overlap and gpu.supports_overlap(device)):
                work.calls[0]()


def measure(kind: str, device: torch.device, limits: Limits, overlap: bool = False) -> Iterator[Row]:
    """Rows of kernel, shape, microseconds, bytes, operations, the limit's microseconds, the share of it.

    With `overlap` a kernel's calls follow each other by programmatic dependent launch, as in a decode graph. A
    kernel that raises gives a row of kernel, shape and `error`, unless the device answers no more.
    """
    for work in KINDS[kind](device):
        row: Row = {
            "kernel": work.name,
            "shape": work.shape,
            "bytes": work.bytes,
            "operations": work.operations,
        }
        try:
            with gpu.overlapping_launches(overlap and gpu.supports_overlap(device)):
                seconds = seconds_of(work.calls)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # the other kernels' times are wanted all the same
            yield row | {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        bound = work.bound(limits)
        yield row | {
            "microseconds": seconds * 1e6,
            "limit_microseconds": bound * 1e6,
            "share_of_limit": bound / seconds,
        }

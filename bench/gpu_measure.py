"""How fast a GPU serves each model, what transformers gives beside it, and each kernel's own time."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenmill.bench import report
from tokenmill.bench.gpu_correct import check_logits
from tokenmill.bench.gpu_models import Sizes, make_engine
from tokenmill.bench.gpu_runner import Check
from tokenmill.bench.gpu_speed import (
    Figure,
    decode_alone,
    idle_share,
    prefill,
    sampler_share,
    serve_jobs,
    transformers_batch,
)
from tokenmill.bench.workload import Workload

if TYPE_CHECKING:
    import torch

    from tokenmill.engine.engine import Engine

CACHE_GIB = 48.0
BATCH_1_TARGETS = {"Llama-3.1-8B": 0.90, "Llama-3.2-1B": 0.82, "Qwen3-0.6B": 0.60}


def measure_fp8(check: Check) -> None:
    """The largest model in 8-bit floats, its weights alone and activations too."""
    for quantization in ("fp8", "fp8_dynamic"):
        _measure_fp8(check, quantization)
        free(check.device)


def _measure_fp8(check: Check, quantization: str) -> None:
    """One stream, and saturated."""
    from tokenmill.kernels.gpu.microbench import fp8_matmul_rate

    name, fields = list(check.sizes.shapes.items())[-1]
    name = f"{name}, {quantization}"
    engine, limits = _engine_of(check, name, fields, quantization=quantization), check.limits
    if engine is None or limits is None:
        return
    if quantization == "fp8_dynamic" and check.device.type == "cuda":
        rate = check.value(f"{name}: limit in 8 bits", lambda: fp8_matmul_rate(check.device))
        if not rate:
            return
        limits = dataclasses.replace(limits, matmul_flops_per_s=rate)
    size = engine.model.size
    head = fields["vocab_size"] * fields["hidden_size"]  # stays as it was
    engine.model.size = dataclasses.replace(size, weight_bytes=size.weights + head)
    alone = partial(decode_alone, engine, limits, *check.sizes.alone, None)
    check.attempt(f"{name}: decode alone", lambda: check.add(name, alone()), limit=60.0)
    jobs = _saturating(check, engine)
    label = "128 in, 128 out, saturated"
    saturated = partial(serve_jobs, engine, limits, label, jobs, check.sizes.batch, 28_000)
    check.attempt(f"{name}: saturated", lambda: check.add(name, saturated()), needs=15.0)


def _saturating(check: Check, engine: Engine) -> list[Any]:
    workload = Workload(prompt_tokens=128, output_tokens=128)
    return _jobs(workload, check.sizes, check.sizes.saturated, engine)


def free(device: torch.device) -> None:
    """Give back what no one holds any more, cycles included; `make_engine` hid them from the collector."""
    import torch

    gc.unfreeze()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_model(check: Check, sections: set[str], name: str) -> None:
    """Logits and speed of one model."""
    fields = check.sizes.shapes[name]
    engine = _engine_of(check, name, fields)
    if engine is None:
        return
    for part, work, needs in _parts(check, sections, name, fields, engine):
        check.attempt(f"{name}: {part}", work, needs=needs)


def _engine_of(check: Check, name: str, fields: dict[str, Any], **settings: Any) -> Engine | None:
    """The engine to measure, all its steps captured, and the machine's limits; None where it can't be had."""
    check.attempt(f"{name}: limits", lambda: measure_limits_once(check), again=True)
    building = f"{name}: building the engine, capturing its steps"
    engine = check.value(building, lambda: _make(check, fields, **settings), needs=45.0)
    if engine is None:
        return None
    graphs = engine.runner.graphs
    if graphs is None or graphs.progress < 1:
        check.fail(f"{name}: not every decode step could be captured")
    print(f"  {engine.runner.forward.name}; {engine.pool.num_blocks:,} KV blocks", flush=True)
    return engine


def _make(check: Check, fields: dict[str, Any], **settings: Any) -> Engine:
    """The engine to measure; its cache leaves room for the same model in float32 beside it."""
    import torch

    from tokenmill.engine.config import KVCacheConfig

    sizes = check.sizes
    cache: dict[str, Any] = {"kv_cache": KVCacheConfig(gib=CACHE_GIB)}
    if check.device.type != "cuda":
        cache = {"num_blocks": 40}
    settings |= cache
    dtype = getattr(torch, sizes.dtype)
    return make_engine(
        fields, check.device, dtype, max_context=sizes.context, max_batch=sizes.batch, **settings
    )


def _parts(
    check: Check, sections: set[str], name: str, fields: dict[str, Any], engine: Engine
) -> Iterator[tuple[str, Callable[[], object], float]]:
    """(what, work, seconds that it needs) for one model."""
    sizes, limits = check.sizes, check.limits
    if "logits" in sections:
        yield "logits", lambda: check_logits(check, name, fields, engine), 15.0
    if "speed" not in sections or limits is None:
        return

    def figure(make: Callable[[], Figure]) -> Callable[[], object]:
        return lambda: check.add(name, make())

    target = BATCH_1_TARGETS.get(name)
    yield "decode alone", figure(lambda: decode_alone(engine, limits, *sizes.alone, target)), 10.0
    if name == "Qwen3-0.6B":
        varied = _jobs(Workload("nano-vllm"), sizes, sizes.jobs, engine)
        work = figure(lambda: serve_jobs(engine, limits, "nano-vllm's workload", varied, sizes.batch, 30_000))
        yield "nano-vllm's workload", work, 40.0
        if check.device.type == "cuda":
            yield "idle share", figure(lambda: idle_share(engine, 64, 40, 0.005)), 10.0
        jobs = _peer_jobs(check, engine)
        work = figure(lambda: serve_jobs(engine, limits, "the peer's jobs", jobs, sizes.batch))
        yield "the peer's jobs", work, 20.0
    if name == "Llama-3.1-8B":
        same = _saturating(check, engine)
        work = figure(
            lambda: serve_jobs(engine, limits, "128 in, 128 out, saturated", same, sizes.batch, 16_000)
        )
        yield "saturated", work, 20.0
    if name == "Llama-3.1-8B" or check.device.type != "cuda":
        yield "sampler", figure(lambda: sampler_share(engine, sizes.rounds, 0.05)), 5.0
        yield "prefill", figure(lambda: prefill(engine, limits, *sizes.prefill, 0.65)), 10.0


def _jobs(workload: Workload, sizes: Sizes, count: int, engine: Engine) -> list[Any]:
    """Jobs of the workload, cut down in a rehearsal to what its context holds."""
    jobs = workload.jobs(count, seed=4)
    if sizes.context > workload.most_tokens:
        return jobs
    width = engine.model.logits_width
    return [
        dataclasses.replace(job, prompt=[number % width] * 5, prompt_tokens=5, output_tokens=3)
        for number, job in enumerate(jobs)
    ]


def _peer_jobs(check: Check, engine: Engine | None = None) -> list[Any]:
    count, prompt, output = check.sizes.peers
    ids = range(100, 300) if check.device.type != "cuda" else range(1000, 10_000)
    return Workload(prompt_tokens=prompt, output_tokens=output, token_ids=ids).jobs(count, seed=5)


def measure_peer(check: Check) -> None:
    """transformers' continuous batching on the jobs that ours ran as well."""
    import torch

    dtype, (name, fields) = getattr(torch, check.sizes.dtype), next(iter(check.sizes.shapes.items()))
    # What it chooses by itself depends on the attention that is installed; with graphs it may take long to warm up.
    for graphs in (True, None) if check.device.type == "cuda" else (None,):
        run = partial(transformers_batch, fields, check.device, dtype, _peer_jobs(check), graphs)
        part = "transformers, graphs" if graphs else "transformers"
        check.attempt(f"{name}: {part}", partial(_add, check, name, run), needs=40.0, limit=75.0)
        free(check.device)


def _add(check: Check, name: str, make: Callable[[], Figure]) -> None:
    check.add(name, make())


def measure_limits_once(check: Check) -> None:
    from tokenmill.bench.limits import measure_limits
    from tokenmill.bench.roofline import Limits

    if check.device.type == "cuda":
        check.limits = measure_limits(str(check.device), check.sizes.dtype)
    else:
        check.limits = Limits("rehearsal", check.sizes.dtype, 1e10, 1e11)
    check.journal.note("limits", **check.limits.row())
    print("  " + report.limits_line(check.limits), flush=True)
    free(check.device)


def measure_kernels(check: Check) -> None:
    """Microbenchmarks, with overlapping launches where the chip has them."""
    from tokenmill.kernels.gpu.microbench import KINDS, fp8_matmul_rate, measure, measure_limits, rehearse
    from tokenmill.kernels.gpu.overlap import supports_overlap

    if check.device.type != "cuda":
        print("  nothing to time in the interpreter")
        return
    overlap = supports_overlap(check.device)
    check.compile_ahead("micro", lambda: rehearse(check.device, overlap))
    limits = check.value("micro: limits", lambda: measure_limits(check.device))
    if limits is None:
        return
    rate = check.value("micro: limit in 8 bits", lambda: fp8_matmul_rate(check.device))
    limits = dataclasses.replace(limits, fp8_operations_per_second=rate or 0.0)
    for kind in KINDS:
        rows = measure(kind, check.device, limits, overlap)
        check.attempt(f"micro: {kind}", partial(_time_kind, check, rows))


def _time_kind(check: Check, rows: Iterator[dict[str, float | str]]) -> None:
    """Note each row; show a kernel's shares of its limit in a line, since there are many rows."""
    shares: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        check.row("micro", dict(row))
        if "error" in row:
            check.fail(f"micro {row['kernel']}, {row['shape']}: {row['error']}")
        else:
            shown = f"{row['shape']} {float(row['microseconds']):.1f} µs"
            shares.setdefault(str(row["kernel"]), []).append((float(row["share_of_limit"]), shown))
    for kernel, found in shares.items():
        (least, worst), (most, best) = min(found), max(found)
        print(f"  {kernel:<22} {least:>4.0%} ({worst}) to {most:.0%} ({best})", flush=True)

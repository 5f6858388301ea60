"""`make gpu-check`: are the kernels, the models and the speed on this GPU what they should be? One call, minutes.

    kernels   every kernel against its plain-torch twin on fresh random inputs
    texts     tiny float32 models: greedy text as by full recomputation, seeds the same at every batch size
    logits    true-sized random models, teacher-forced: the error against float32 beside transformers' in bfloat16
    speed     decode, prefill and whole workloads, each with its share of limits measured in this run
    peers     transformers' own continuous batching on the same jobs
    fp8       the largest model with weights in 8-bit floats, then with activations in them too
    micro     each kernel's time beside the limit of its bytes and operations

Sections run until the budget is spent; what is left out is said. It needs no network and no HTTP library. Where
there is no GPU it says so in one line and exits 0; `--rehearse` runs it all small, on the CPU, in Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.bench import report
from tokenmill.bench.gpu_models import Sizes, build_module, make_engine, rehearsal, shrunk
from tokenmill.bench.gpu_report import Check, print_table, write_results
from tokenmill.bench.gpu_speed import (
    Figure,
    decode_alone,
    idle_share,
    prefill,
    sampler_share,
    serve_jobs,
    transformers_batch,
)
from tokenmill.bench.machine import describe_versions
from tokenmill.bench.workload import Workload

if TYPE_CHECKING:
    import torch

    from tokenmill.engine.engine import Engine

SECTIONS = ("kernels", "texts", "logits", "speed", "peers", "fp8", "micro")
MOST_ERROR = 2.0
"""Times transformers' own bfloat16 error that ours may be."""
CACHE_GIB = 48.0
BATCH_1_TARGETS = {"Llama-3.1-8B": 0.90, "Llama-3.2-1B": 0.82, "Qwen3-0.6B": 0.60}


# ---------------------------------------------------------------- right


def check_kernels(check: Check) -> None:
    """Every kernel against its twin."""
    from tokenmill.kernels.gpu.selfcheck import check_all

    results = check_all(check.device, check.seed)
    check.rows["kernels"] = [{**dataclasses.asdict(x), "passed": x.passed} for x in results]
    for result in results:
        if not result.passed:
            check.fail(f"kernel {result.name}: error {result.error:.2e}, allowed {result.tolerance:.0e}")
    print(f"  {sum(x.passed for x in results)} of {len(results)} kernel checks passed", flush=True)


def check_texts(check: Check) -> None:
    """Greedy text of tiny float32 models, and seeded text in batches of several sizes."""
    import torch

    from tokenmill.engine.sampling_params import SamplingParams

    count = 24 if check.device.type == "cuda" else 3
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=count, ignore_eos=True)
    generator = random.Random(check.seed)
    for name, fields in check.sizes.shapes.items():
        small = shrunk(fields) | {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        small = small if check.device.type == "cuda" else shrunk(fields)
        engine = make_engine(small, check.device, torch.float32, max_context=256, max_batch=4, num_blocks=80)
        prompts = [[generator.randrange(10, 320) for _ in range(length)] for length in (1, 9, 17)]
        expected = _recomputed(build_module(small, check.device, torch.float32, "eager"), prompts, count)
        found = _generate(engine, prompts, [greedy] * len(prompts))
        if found != expected:
            check.fail(f"{name}, tiny: greedy text differs from full recomputation")
        alone = _generate(engine, prompts[:1], [seeded])[0]
        crowd = _generate(engine, [*prompts[1:], prompts[0]], [greedy, greedy, seeded])[-1]
        if alone != crowd:
            check.fail(f"{name}, tiny: a seeded text changes with its batch")


def _recomputed(module: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    import torch

    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(count):
                logits = module(torch.tensor([ids], device=module.device), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            texts.append(ids[len(prompt) :])
    return texts


def _generate(engine: Engine, prompts: list[list[int]], params: list[Any]) -> list[list[int]]:
    from tokenmill.engine.messages import Add

    texts: list[list[int]] = [[] for _ in prompts]
    for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add(Add(number, prompt, one))
    while engine.has_work:
        for delta in engine.step():
            if delta.error is not None:
                raise RuntimeError(delta.error)
            texts[delta.request] += delta.token_ids
    return texts


def check_logits(check: Check, name: str, fields: dict[str, Any], engine: Engine) -> None:
    """Our error against float32 on one text, prefill and decodes, beside transformers' in the same dtype."""
    import torch

    from tokenmill.engine.forward import PagedForward

    assert isinstance(engine.runner.forward, PagedForward)
    length, dtype = check.sizes.text, getattr(torch, check.sizes.dtype)
    generator = torch.Generator().manual_seed(check.seed)
    ids = torch.randint(0, fields["vocab_size"], (length,), generator=generator).to(check.device)
    half = length // 2
    ours = engine.runner.forward.teacher_forced(ids, [half, length - half - 3, 1, 1, 1]).float()
    module = build_module(fields, check.device, dtype, "sdpa")
    with torch.inference_mode():
        theirs = module(ids[None], use_cache=False).logits[0].float()
        module.float()
        wanted = module(ids[None], use_cache=False).logits[0]
    errors = [float((x - wanted).norm() / wanted.norm()) for x in (ours, theirs)]
    agree = [float((x.argmax(-1) == wanted.argmax(-1)).float().mean()) for x in (ours, theirs)]
    row = {
        "error": errors[0],
        "transformers_error": errors[1],
        "top_1": agree[0],
        "transformers_top_1": agree[1],
    }
    check.rows.setdefault("logits", {})[name] = row
    print(
        f"  error {errors[0]:.2e}, transformers {errors[1]:.2e}; same top token {agree[0]:.3f}, {agree[1]:.3f}"
    )
    if not errors[0] <= max(MOST_ERROR * errors[1], 1e-5):
        check.fail(f"{name}: logits are off by {errors[0]:.2e}, transformers' by {errors[1]:.2e}")


# ---------------------------------------------------------------- fast


def measure_models(check: Check, sections: set[str]) -> None:
    """Logits and speed, one model in memory at a time."""
    for name, fields in check.sizes.shapes.items():
        _measure_model(check, sections, name, fields)
        _free(check.device)
        if "peers" in sections and name == "Qwen3-0.6B":
            check.attempt(f"{name}: transformers", partial(measure_peer, check, name, fields), needs=60.0)
            _free(check.device)


def measure_fp8(check: Check, quantization: str) -> None:
    """The largest model in 8-bit floats: one stream, and saturated."""
    from tokenmill.kernels.gpu.microbench import fp8_matmul_rate

    name, fields = list(check.sizes.shapes.items())[-1]
    limits = check.limits
    if limits is None:
        return
    if quantization == "fp8_dynamic" and check.device.type == "cuda":
        limits = dataclasses.replace(limits, matmul_flops_per_s=fp8_matmul_rate(check.device))
    engine = _make(check, fields, quantization=quantization)
    size = engine.model.size
    head = fields["vocab_size"] * fields["hidden_size"]  # stays as it was
    engine.model.size = dataclasses.replace(size, weight_bytes=size.weights + head)
    check.add(f"{name}, {quantization}", decode_alone(engine, limits, *check.sizes.alone, None))
    jobs = _saturating(check, engine)
    figure = serve_jobs(engine, limits, "128 in, 128 out, saturated", jobs, check.sizes.batch, 28_000)
    check.add(f"{name}, {quantization}", figure)


def _saturating(check: Check, engine: Engine) -> list[Any]:
    workload = Workload(prompt_tokens=128, output_tokens=128)
    return _jobs(workload, check.sizes, check.sizes.saturated, engine)


def _free(device: torch.device) -> None:
    """Give back what no one holds any more, cycles included."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure_model(check: Check, sections: set[str], name: str, fields: dict[str, Any]) -> None:
    engine: list[Engine] = []
    check.attempt(
        f"{name}: building the engine, capturing its steps",
        lambda: engine.append(_make(check, fields)),
        needs=45.0,
    )
    if not engine:
        return
    graphs = engine[0].runner.graphs
    if graphs is None or graphs.progress < 1:
        check.fail(f"{name}: not every decode step could be captured")
    print(f"  {engine[0].runner.forward.name}; {engine[0].pool.num_blocks:,} KV blocks", flush=True)
    for part, work, needs in _parts(check, sections, name, fields, engine[0]):
        check.attempt(f"{name}: {part}", work, needs=needs)


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
        yield "sampler", figure(lambda: sampler_share(engine, sizes.rounds, 0.05)), 5.0
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


def measure_peer(check: Check, name: str, fields: dict[str, Any]) -> None:
    """transformers' continuous batching on the jobs that ours ran as well."""
    import torch

    dtype = getattr(torch, check.sizes.dtype)
    check.add(name, transformers_batch(fields, check.device, dtype, _peer_jobs(check)))


def measure_limits_once(check: Check) -> None:
    from tokenmill.bench.limits import measure_limits
    from tokenmill.bench.roofline import Limits

    if check.device.type == "cuda":
        check.limits = measure_limits(str(check.device), check.sizes.dtype)
    else:
        check.limits = Limits("rehearsal", check.sizes.dtype, 1e10, 1e11)
    print("  " + report.limits_line(check.limits), flush=True)


def measure_kernels(check: Check) -> None:
    """Microbenchmarks, with overlapping launches where the chip has them."""
    from tokenmill.kernels.gpu.microbench import measure_all
    from tokenmill.kernels.gpu.overlap import supports_overlap

    if check.device.type != "cuda":
        print("  nothing to time in the interpreter")
        return
    check.rows["micro"] = rows = measure_all(check.device, overlap=supports_overlap(check.device))
    for row in rows:
        print(
            f"  {row['kernel']:<24} {row['shape']:<32} {row['microseconds']:>9.1f} µs {row['share_of_limit']:>6.0%}"
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description="Kernels, models and speed on an NVIDIA GPU."
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, metavar="S", help="seconds for all (default 540)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default $OUT, else bench/results/gpu)"
    )
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(1 << 31), help="default: a new one"
    )
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, in Triton's interpreter")
    args = parser.parse_args(argv)
    args.sections = set(filter(None, args.sections.split(",")))
    unknown = sorted(args.sections - set(SECTIONS))
    if unknown:
        parser.error(f"--sections: {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    results = Path(__file__).resolve().parent / "results" / "gpu"
    args.out = args.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else results)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the check; 0 when nothing failed, or when there is no GPU to check."""
    args = _arguments(argv)
    if args.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "TOKENMILL_KERNELS": "triton"}
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check: there is no NVIDIA GPU that torch can use here; nothing was checked")
        return 0
    from tokenmill.kernels import gpu

    reason = gpu.check_toolchain() if gpu.available() else "Triton isn't installed"
    if reason is not None:
        print(f"gpu-check: {reason}")
        return 1
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", 0)
    check = Check(device, rehearsal() if args.rehearse else Sizes(), args.budget, args.seed)
    print(f"seed {args.seed}, {describe_versions()}", flush=True)
    if "kernels" in args.sections:
        check.attempt("kernels", lambda: check_kernels(check))
    if "texts" in args.sections:
        check.attempt("texts", lambda: check_texts(check))
    if {"speed", "logits", "peers", "fp8"} & args.sections:
        check.attempt("limits", lambda: measure_limits_once(check))
    if {"speed", "logits", "peers"} & args.sections:
        measure_models(check, args.sections)
    if "fp8" in args.sections:
        for quantization in ("fp8", "fp8_dynamic"):
            check.attempt(quantization, partial(measure_fp8, check, quantization), needs=60.0)
            _free(device)
    if "micro" in args.sections:
        check.attempt("micro", lambda: measure_kernels(check), needs=60.0)
    write_results(check, args.out, args.sections)
    print_table(check)
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())

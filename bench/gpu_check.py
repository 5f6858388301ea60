"""`make gpu-check`: are the kernels, the models and the speed on this GPU what they should be? One call, minutes.

    kernels   every kernel against its plain-torch twin on fresh random inputs
    texts     tiny float32 models: greedy text as by full recomputation, seeds the same at every batch size
    logits    true-sized random models, teacher-forced: the error against float32 beside transformers' in bfloat16
    speed     decode, prefill and whole workloads, each with its share of limits measured in this run
    peers     transformers' own continuous batching on the same jobs
    fp8       the largest model with weights in 8-bit floats
    micro     each kernel's time beside the limit of its bytes and operations

Sections run until the budget is spent, each model's and each other one in a process of its own (gpu_runner.py);
what is left out is said. It needs no network and no HTTP library. Where there is no GPU it says so in one line and
exits 0; `--rehearse` runs it all small, on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.bench import report
from tokenmill.bench.gpu_journal import Findings, Journal
from tokenmill.bench.gpu_models import SHAPES, Sizes, build_module, make_engine, rehearsal, shrunk
from tokenmill.bench.gpu_report import print_table, write_results
from tokenmill.bench.gpu_runner import RESERVE_S, Check, supervise
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
    from tokenmill.kernels.gpu.selfcheck import CheckResult

SECTIONS = ("kernels", "texts", "logits", "speed", "peers", "fp8", "micro")
MOST_ERROR = 2.0
"""Times transformers' own bfloat16 error that ours may be."""
CACHE_GIB = 48.0
BATCH_1_TARGETS = {"Llama-3.1-8B": 0.90, "Llama-3.2-1B": 0.82, "Qwen3-0.6B": 0.60}


# ---------------------------------------------------------------- right


def check_kernels(check: Check) -> None:
    """Every kernel against its twin, those of a kind together."""
    from tokenmill.kernels.gpu.selfcheck import check_groups

    for name, results in check_groups(check.device, check.seed).items():
        check.attempt(f"kernels: {name}", partial(_check_group, check, results))


def _check_group(check: Check, results: Iterator[CheckResult]) -> None:
    count, last = 0, "the first"
    try:
        for result in results:
            count, last = count + 1, result.name
            check.row("kernels", {**dataclasses.asdict(result), "passed": result.passed})
            if not result.passed:
                check.fail(f"kernel {last}: error {result.error:.2e}, allowed {result.tolerance:.0e}")
    except Exception as error:
        raise RuntimeError(
            f"after {count} checks, {last} the last: {type(error).__name__}: {error}"
        ) from error
    print(f"  {count} checks", flush=True)


def check_texts(check: Check) -> None:
    """Greedy text of tiny float32 models, and seeded text in batches of several sizes."""
    for name, fields in check.sizes.shapes.items():
        check.attempt(f"{name}, tiny: texts", partial(_check_text, check, name, fields))


def _check_text(check: Check, name: str, fields: dict[str, Any]) -> None:
    import torch

    from tokenmill.engine.sampling_params import SamplingParams

    on_gpu = check.device.type == "cuda"
    count, generator = 24 if on_gpu else 3, random.Random(check.seed)
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    seeded = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=count, ignore_eos=True)
    small = shrunk(fields)
    if on_gpu:
        small |= {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    engine = make_engine(small, check.device, torch.float32, max_context=256, max_batch=4, num_blocks=80)
    prompts = [[generator.randrange(10, 320) for _ in range(length)] for length in (1, 9, 17)]
    expected = _recomputed(build_module(small, check.device, torch.float32, "eager"), prompts, count)
    found = _generate(engine, prompts, [greedy] * len(prompts))
    if found != expected:
        same = [_agreed(*texts) for texts in zip(found, expected, strict=True)]
        check.fail(f"{name}, tiny: greedy texts agree with full recomputation for {same} of {count} tokens")
    alone = _generate(engine, prompts[:1], [seeded])[0]
    crowd = _generate(engine, [*prompts[1:], prompts[0]], [greedy, greedy, seeded])[-1]
    if alone != crowd:
        agreed = _agreed(alone, crowd)
        check.fail(f"{name}, tiny: a seeded text changes with its batch after {agreed} of {count} tokens")


def _agreed(one: list[int], other: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


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
        "model": name,
        "error": errors[0],
        "transformers_error": errors[1],
        "top_1": agree[0],
        "transformers_top_1": agree[1],
    }
    check.row("logits", row)
    print(
        f"  error {errors[0]:.2e}, transformers {errors[1]:.2e}; same top token {agree[0]:.3f}, {agree[1]:.3f}"
    )
    if not errors[0] <= max(MOST_ERROR * errors[1], 1e-5):
        check.fail(f"{name}: logits are off by {errors[0]:.2e}, transformers' by {errors[1]:.2e}")


# ---------------------------------------------------------------- fast


def measure_fp8(check: Check) -> None:
    """The largest model with its weights in fp8: one stream, and saturated."""
    name, fields = list(check.sizes.shapes.items())[-1]
    name = f"{name}, fp8"
    engine, limits = _engine_of(check, name, fields, quantization="fp8"), check.limits
    if engine is None or limits is None:
        return
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


def _free(device: torch.device) -> None:
    """Give back what no one holds any more, cycles included."""
    import torch

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
    engines: list[Engine] = []
    check.attempt(f"{name}: limits", lambda: measure_limits_once(check), again=True)
    check.attempt(
        f"{name}: building the engine, capturing its steps",
        lambda: engines.append(_make(check, fields, **settings)),
        needs=45.0,
        again=True,
    )
    if not engines:
        return None
    engine = engines[0]
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


def measure_peer(check: Check) -> None:
    """transformers' continuous batching on the jobs that ours ran as well."""
    import torch

    dtype, (name, fields) = getattr(torch, check.sizes.dtype), next(iter(check.sizes.shapes.items()))
    run = partial(transformers_batch, fields, check.device, dtype, _peer_jobs(check))
    check.attempt(f"{name}: transformers", lambda: check.add(name, run()), needs=40.0)


def measure_limits_once(check: Check) -> None:
    from tokenmill.bench.limits import measure_limits
    from tokenmill.bench.roofline import Limits

    if check.device.type == "cuda":
        check.limits = measure_limits(str(check.device), check.sizes.dtype)
    else:
        check.limits = Limits("rehearsal", check.sizes.dtype, 1e10, 1e11)
    check.journal.note("limits", **check.limits.row())
    print("  " + report.limits_line(check.limits), flush=True)
    _free(check.device)


def measure_kernels(check: Check) -> None:
    """Microbenchmarks, with overlapping launches where the chip has them."""
    from tokenmill.kernels.gpu.microbench import KINDS, measure, measure_limits
    from tokenmill.kernels.gpu.overlap import supports_overlap

    if check.device.type != "cuda":
        print("  nothing to time in the interpreter")
        return
    limits, overlap = measure_limits(check.device), supports_overlap(check.device)
    for kind in KINDS:
        check.attempt(
            f"micro: {kind}",
            lambda kind=kind: _time_kind(check, measure(kind, check.device, limits, overlap)),
        )


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


# ---------------------------------------------------------------- one call


def units(sections: set[str], models: list[str]) -> list[str]:
    """What runs in a process of its own, in order."""
    first, last = ([x for x in names if x in sections] for names in (("kernels", "texts"), ("fp8", "micro")))
    speed = models if {"logits", "speed"} & sections else []
    peers = ["peers"] if "peers" in sections else []
    return [*first, *speed[:1], *peers, *speed[1:], *last]


def run_unit(check: Check, unit: str, sections: set[str]) -> None:
    """One of `units`, in this process."""
    whole: dict[str, Callable[[Check], None]] = {
        "kernels": check_kernels,
        "texts": check_texts,
        "peers": measure_peer,
        "fp8": measure_fp8,
        "micro": measure_kernels,
    }
    if unit in whole:
        whole[unit](check)
    else:
        measure_model(check, sections, unit)
    _free(check.device)


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
    parser.add_argument(
        "--models",
        default=",".join(SHAPES),
        help=f"for logits and speed: of {', '.join(SHAPES)} (default: all)",
    )
    parser.add_argument(
        "--one-process", action="store_true", help="all sections in this one, to look for a fault"
    )
    parser.add_argument("--unit", help=argparse.SUPPRESS)  # what a process of a section runs
    args = parser.parse_args(argv)
    for option, known in (("sections", SECTIONS), ("models", SHAPES)):
        chosen = list(filter(None, getattr(args, option).split(",")))
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            parser.error(f"--{option}: {unknown[0]!r} is none of {', '.join(known)}")
        setattr(args, option, chosen)
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
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out / "gpu-check.jsonl")
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", 0)
    sizes, sections = rehearsal() if args.rehearse else Sizes(), set(args.sections)
    if args.unit is not None:
        check = Check(device, sizes, args.budget, args.seed, journal, own_process=True)
        run_unit(check, args.unit, sections)
        return 0
    began = time.monotonic()
    journal.file.unlink(missing_ok=True)
    print(f"seed {args.seed}, {describe_versions()}", flush=True)
    wanted = units(sections, [name for name in sizes.shapes if name in args.models])
    if args.one_process:
        check = Check(device, sizes, args.budget, args.seed, journal)
        for unit in wanted:
            run_unit(check, unit, sections)
    else:
        for unit in wanted:
            supervise(
                unit,
                partial(_command, args, unit),
                journal,
                args.budget - RESERVE_S / 2 - (time.monotonic() - began),
            )
    found, seconds = Findings.read(journal), time.monotonic() - began
    about = {"sections": args.sections, "models": args.models, "seed": args.seed, "seconds": seconds}
    write_results(found, args.out, about)
    print_table(found, seconds)
    return 1 if found.failures else 0


def _command(args: argparse.Namespace, unit: str, seconds: float) -> list[str]:
    """What runs one unit with the options of this run."""
    command = [
        sys.executable,
        "-m",
        "tokenmill.bench.gpu_check",
        "--unit",
        unit,
        "--budget",
        f"{seconds:.0f}",
    ]
    command += ["--seed", str(args.seed), "--out", str(args.out), "--sections", ",".join(args.sections)]
    return [*command, "--rehearse"] if args.rehearse else command


if __name__ == "__main__":
    sys.exit(main())

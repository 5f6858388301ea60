"""`make gpu-check`: are the kernels, the models and the speed on this GPU what they should be? One call, minutes.

    kernels   every kernel against its plain-torch twin on fresh random inputs
    texts     tiny float32 models: greedy text as by full recomputation, seeds the same at every batch size
    logits    true-sized random models, teacher-forced: the error against float32 beside transformers' in bfloat16
    speed     decode, prefill and whole workloads, each with its share of limits measured in this run
    peers     transformers' own continuous batching on the same jobs
    fp8       the largest model with weights in 8-bit floats, then with activations in them too
    micro     each kernel's time beside the limit of its bytes and operations

Sections run until the budget is spent, each model's and each other one in a process of its own (gpu_runner.py);
what is left out is said. It needs no network and no HTTP library. Where there is no GPU it says so in one line and
exits 0; `--rehearse` runs it all small, on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenmill.bench.gpu_correct import check_kernels, check_texts
from tokenmill.bench.gpu_journal import Findings, Journal
from tokenmill.bench.gpu_measure import free, measure_fp8, measure_kernels, measure_model, measure_peer
from tokenmill.bench.gpu_models import SHAPES, Sizes, rehearsal
from tokenmill.bench.gpu_report import draw_results, print_table, write_results
from tokenmill.bench.gpu_runner import RESERVE_S, Check, supervise
from tokenmill.bench.machine import describe_versions

SECTIONS = ("kernels", "texts", "logits", "speed", "peers", "fp8", "micro")
ALONE = frozenset({"kernels", "micro"})
"""Sections of kernels alone: torch and Triton are all they need."""
ENGINE_NEEDS = ("msgspec", "tokenizers", "transformers")
UNIT_S = 240.0
"""Most seconds of one process's section, its beginnings anew included."""


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
    free(check.device)


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
    began = time.monotonic()  # importing torch for the first time may take a minute
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
        sys.stdout.flush()
        os._exit(0)  # without taking down what the GPU holds, which the system does as well
    journal.file.unlink(missing_ok=True)
    print(f"seed {args.seed}, {describe_versions()}", flush=True)
    sections = _without_missing(sections, journal)
    wanted = units(sections, [name for name in sizes.shapes if name in args.models])
    check = Check(device, sizes, args.budget, args.seed, journal)
    for unit in wanted:
        if args.one_process:
            run_unit(check, unit, sections)
        else:
            left = args.budget - RESERVE_S / 2 - (time.monotonic() - began)
            supervise(unit, partial(_command, args, unit), journal, min(left, UNIT_S))
        write_results(Findings.read(journal), args.out, _about(args, began))
    found = Findings.read(journal)
    file = write_results(found, args.out, _about(args, began))
    print(f"\nResults in {file}")
    draw_results(found, args.out)
    print_table(found, time.monotonic() - began)
    return 1 if found.failures else 0


def _about(args: argparse.Namespace, began: float) -> dict[str, Any]:
    """The run's own fields of the results."""
    seconds = time.monotonic() - began
    return {"sections": args.sections, "models": args.models, "seed": args.seed, "seconds": seconds}


def _without_missing(sections: set[str], journal: Journal) -> set[str]:
    """The sections that can run with what is installed; the rest, one line says why not, are a failure."""
    missing = [name for name in ENGINE_NEEDS if importlib.util.find_spec(name) is None]
    left_out = sections - ALONE if missing else set()
    if left_out:
        names = ", ".join(name for name in SECTIONS if name in left_out)
        what = f"{names}: not run, {' and '.join(missing)} not installed (pip install {' '.join(missing)})"
        journal.note("failure", what=what)
        print(f"FAILED {what}", flush=True)
    return sections - left_out


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

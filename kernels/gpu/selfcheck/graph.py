"""Kernels replayed from a CUDA graph: inputs that change under it, launches that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tokenmill.kernels import gpu, reference
from tokenmill.kernels.gpu.cases import paged_case, relative_error
from tokenmill.kernels.gpu.selfcheck.trial import TOLERANCE, CheckResult, Trial, differing


def graph(trial: Trial) -> Iterator[CheckResult]:
    """A captured decode step, replayed after lengths, tables and caches have changed under it."""
    rows, dtype = 4, torch.bfloat16
    make: dict[str, Any] = {"heads": 8, "kv_heads": 2, "size": 128, "dtype": dtype, "device": trial.device}
    first = paged_case(trial.generator, [trial.context, 1, 70, 300], [1] * rows, **make)
    second = paged_case(trial.generator, [70, trial.context, 300, 1], [1] * rows, **make)
    plan = gpu.make_decode_plan(rows, 8, 2, 128, 128, dtype, trial.device)
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


def overlap(trial: Trial) -> Iterator[CheckResult]:
    """A chain of kernels that each read the last one's result: overlapped, they must wait for it."""
    width, dtype = 1024, torch.bfloat16
    x, out = trial.randn(4, width, dtype=dtype), torch.empty(4, width, dtype=dtype, device=trial.device)
    norm = trial.randn(width, dtype=dtype)
    gate_up = trial.randn(4 * width, width, dtype=dtype) * width**-0.5
    down = trial.randn(width, 2 * width, dtype=dtype) * width**-0.5

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
    with gpu.overlapping_launches(gpu.supports_overlap(trial.device)):
        graph = _captured(step)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        yield CheckResult("overlapping launches change nothing", differing(out, expected), 0.0)

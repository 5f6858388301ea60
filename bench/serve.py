"""`tokenmill bench serve`: OpenAI-compatible servers under load over HTTP.

Several servers are measured in turn, A B A B, with the same requests in each round, and compared within a
round: a shared machine drifts by the hour, while a ratio taken within minutes holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmill.bench import report, servers, workload
from tokenmill.bench.distribution import median
from tokenmill.bench.limits import measure_limits
from tokenmill.bench.load import (
    Outcome,
    Target,
    closed_loop,
    latencies,
    open_loop,
    poisson_arrivals,
    request_body,
)
from tokenmill.bench.options import BenchError, integers, positive
from tokenmill.bench.reply import Reply
from tokenmill.bench.report import Point, Report, milliseconds, number, percent
from tokenmill.bench.roofline import Footprint, Limits, Work, flops_per_byte, least_seconds
from tokenmill.bench.session import DTYPES, check_device
from tokenmill.bench.workload import Workload

COLUMNS = ("server", "load", "output tok/s", "share", "TTFT ms", "ITL ms", "E2E ms", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    servers.add_arguments(parser)
    group = parser.add_argument_group("load")
    group.add_argument(
        "--concurrency", type=integers, default=[1, 8, 32], metavar="N,N", help="closed loop (default 1,8,32)"
    )
    group.add_argument("--rate", type=rates, metavar="R,R", help="open loop instead: arrivals a second")
    group.add_argument(
        "--requests", type=positive, metavar="N", help="a round (default: twice the concurrency, 4 at least)"
    )
    group.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="the median counts (default 3 with several servers, else 1)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--no-limits", action="store_true", help="don't measure this machine's (a remote server)"
    )
    group.add_argument("--limits-device", default="cpu", metavar="DEVICE", help="cpu or cuda")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the server's arithmetic")
    group.add_argument(
        "--weights-mb", type=float, metavar="MB", help="that a step reads, as throughput prints"
    )
    group.add_argument("--kv-kb", type=float, metavar="KB", help="of cache a token, as throughput prints")
    workload.add_arguments(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all servers at all loads and publish the result; 1 when no request was answered."""
    work = workload.from_arguments(args)
    if args.path.endswith("chat/completions") and work.form == "ids":
        raise BenchError("chat takes text: add --prompts text")
    limits = None
    if not args.no_limits:
        print("Measuring this machine's limits ...", flush=True)
        limits = measure_limits(check_device(args.limits_device), args.dtype)
        print(report.limits_line(limits))
    footprint = _footprint(args)
    measured = _run_loop(_measure_all(args, work))
    points = [_as_point(series, limits, footprint) for series in measured]
    print(report.table(COLUMNS, [_cells(point) for point in points]))
    print("TTFT, ITL and E2E: p50 / p90 / p99")
    _print_ratios(measured)
    _print_shortfalls(measured)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "run")}
    settings["load"] = "arrivals a second" if args.rate else "requests at once"
    result = Report("tokenmill bench serve", settings, points, limits, footprint)
    report.publish(result, args)
    return 0 if any(outcome.good for series in measured for outcome in series.outcomes) else 1


@dataclass(slots=True)
class Series:
    """One server at one load: the outcome of each round, and how many tokens were asked for in all."""

    name: str
    load: float
    outcomes: list[Outcome] = field(default_factory=list)
    asked_tokens: int = 0

    @property
    def failures(self) -> list[str]:
        return [failure for outcome in self.outcomes for failure in outcome.failures]

    @property
    def output_tokens(self) -> int:
        return sum(output for outcome in self.outcomes for _, output in outcome.lengths)


async def _measure_all(args: argparse.Namespace, work: Workload) -> list[Series]:
    targets = await servers.open_targets(args)
    rounds = args.rounds or (3 if len(targets) > 1 else 1)
    loads: list[float] = args.rate or args.concurrency
    try:
        for target in targets:
            await servers.warm_up(target, work)
        measured: list[Series] = []
        for load in loads:
            requests = args.requests or max(4, round(2 * load))
            now = [Series(target.name, load) for target in targets]
            for turn in range(rounds):
                seed = args.seed * 1_000_003 + round(load * 1009) + turn
                jobs = work.jobs(requests, seed)
                for target, series in zip(targets, now, strict=True):
                    bodies = [request_body(target, job) for job in jobs]
                    title = f"{target.name}, {load:g}, round {turn + 1} of {rounds}"
                    series.outcomes.append(await _one_run(target, bodies, load, bool(args.rate), seed, title))
                    series.asked_tokens += sum(job.output_tokens for job in jobs)
            measured += now
        return measured
    finally:
        for target in targets:
            target.client.close()


async def _one_run(
    target: Target, bodies: Sequence[bytes], load: float, by_clock: bool, seed: int, title: str
) -> Outcome:
    from tqdm import tqdm

    with tqdm(total=len(bodies), unit="req", desc=title, leave=False, disable=None) as bar:

        def advance(reply: Reply) -> None:
            bar.update()

        if by_clock:
            return await open_loop(target, bodies, poisson_arrivals(load, len(bodies), seed), advance)
        return await closed_loop(target, bodies, round(load), advance)


def _as_point(series: Series, limits: Limits | None, footprint: Footprint | None) -> Point:
    """The median round's rate, latencies over all rounds."""
    outcomes = series.outcomes
    rates = [outcome.output_per_s for outcome in outcomes]
    lengths = [length for outcome in outcomes for length in outcome.lengths]
    limit = intensity = None
    if limits is not None and footprint is not None and lengths:
        work = Work(lengths, max(1, min(round(_most_at_once(outcomes)), len(lengths))))
        limit = work.output_tokens / least_seconds(limits, footprint, work)
        intensity = flops_per_byte(footprint, work)
    return Point(
        series=series.name,
        load=series.load,
        output_per_s=median(rates),
        latencies=latencies(outcomes),
        limit=limit,
        intensity=intensity,
        extra={
            "requests": sum(len(outcome.replies) for outcome in outcomes),
            "failures": len(series.failures),
            "rounds_output_tokens_per_s": rates,
            "prompt_tokens": sum(prompt for prompt, _ in lengths),
            "output_tokens": series.output_tokens,
            "asked_tokens": series.asked_tokens,
        },
    )


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Most requests that were ever under way together."""
    most = 0
    for outcome in outcomes:
        changes = sorted(change for reply in outcome.good for change in ((reply.began, 1), (reply.ended, -1)))
        now = 0
        for _, change in changes:
            now += change
            most = max(most, now)
    return most


def _cells(point: Point) -> list[str]:
    found = point.latencies
    return [
        point.series,
        f"{point.load:g}",
        number(point.output_per_s, 1),
        percent(point.share),
        *(milliseconds(found[name]) for name in ("TTFT", "ITL", "E2E")),
        str(point.extra["failures"]),
    ]


def _print_ratios(measured: Sequence[Series]) -> None:
    """Each server's output rate over the first one's: the median of the rounds, and their range."""
    first = measured[0].name
    base = {series.load: series.outcomes for series in measured if series.name == first}
    rows = []
    for series in measured:
        ratios = ratios_of(series.outcomes, base[series.load])
        if series.name != first and ratios:
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append([series.name, f"{series.load:g}", f"{median(ratios):.2f}", spread])
    if rows:
        print(f"\nOutput rate over that of {first}, round by round:")
        print(report.table(("server", "load", "median", "range"), rows))


def ratios_of(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> list[float]:
    """Output rates over the base's of the same round; rounds in which the base made nothing are left out."""
    return [
        one.output_per_s / other.output_per_s
        for one, other in zip(outcomes, base, strict=True)
        if other.output_per_s > 0
    ]


def _print_shortfalls(measured: Sequence[Series]) -> None:
    """Failed requests, and answers that ended early: rates over unlike work don't compare."""
    for series in measured:
        failed = len(series.failures)
        if failed:
            print(
                f"\n{series.name} at {series.load:g}: {failed} requests failed, first: {series.failures[0]}"
            )
        elif series.output_tokens < series.asked_tokens:
            print(
                f"\n{series.name} at {series.load:g} made {series.output_tokens:,} of the "
                f"{series.asked_tokens:,} tokens asked for: it doesn't know or heed ignore_eos"
            )


def _footprint(args: argparse.Namespace) -> Footprint | None:
    if args.weights_mb is None:
        return None
    width = 4 if args.dtype == "float32" else 2
    weight_bytes = 1e6 * args.weights_mb
    return Footprint(weight_bytes, weight_bytes / width, 1e3 * (args.kv_kb or 0.0))


def rates(text: str) -> list[float]:
    """`0.5,2` as an argparse type: numbers above 0, ascending, each once."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 0.5,2") from None
    if not values[0] > 0 or values[-1] == float("inf"):
        raise argparse.ArgumentTypeError("each rate must be above 0")
    return values


def _run_loop(work: Coroutine[Any, Any, list[Series]]) -> list[Series]:
    """asyncio.run, on uvloop where there is one."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        factory = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)

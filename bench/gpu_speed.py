"""The speed of one engine on a GPU, each figure with the share of what the machine allows for the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenmill.bench.distribution import median
from tokenmill.bench.footprint import footprint_of
from tokenmill.bench.offline import Driver, Run
from tokenmill.bench.roofline import Limits, Work, least_seconds, prefill_seconds
from tokenmill.bench.workload import Job, Workload

if TYPE_CHECKING:
    from tokenmill.engine.engine import Engine


class CannotMeasure(Exception):
    """What a part needs isn't to be had on this machine; the message says why. That isn't a failure."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: a rate and its limit, or a share; `target` as issue 5 has it, in the same unit."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    target: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """The part of the limit that was reached."""
        return None if not self.limit else self.value / self.limit

    def fields(self) -> dict[str, object]:
        """What makes it again."""
        return asdict(self)

    def row(self) -> dict[str, object]:
        """For the JSON file."""
        return self.fields() | {"share_of_limit": self.share}


def drive(engine: Engine, jobs: Sequence[Job], batch: int) -> Run:
    """Run jobs of token ids through the engine, at most `batch` at once."""
    llm: Any = SimpleNamespace(engine=engine, tokenizer=None)
    clear(engine)
    return Driver(llm).run(jobs, batch)


def clear(engine: Engine) -> None:
    """Leave nothing of what ran before: neither requests of a run that failed nor cached prefixes."""
    engine.abort_all()
    while engine.has_work:
        engine.step()
    engine.pool.reset_cache()


def decode_alone(engine: Engine, limits: Limits, prompt: int, output: int, target: float | None) -> Figure:
    """Tokens a second of one stream, by the median decode step."""
    jobs = Workload(prompt_tokens=prompt, output_tokens=output, token_ids=_ids(engine)).jobs(2, seed=1)
    drive(engine, jobs[:1], 1)
    run = drive(engine, jobs[1:], 1)
    footprint = footprint_of(engine)
    read = footprint.read_bytes(1) + (prompt + output / 2) * footprint.kv_bytes_per_token
    limit = limits.read_bytes_per_s / read
    return Figure("decode, batch 1", 1 / median(run.decode_steps), "tok/s", limit, _of(target, limit))


def serve_jobs(
    engine: Engine, limits: Limits, name: str, jobs: Sequence[Job], batch: int, target: float | None = None
) -> Figure:
    """Output tokens a second over all of the jobs, prefill included. `target` in tokens a second.

    A few of them run before, short: a kernel's first call for a kind of step loads it, or even compiles it.
    """
    short = [
        replace(job, output_tokens=min(job.output_tokens, 3 + number)) for number, job in enumerate(jobs[:8])
    ]
    drive(engine, short, 4)
    run = drive(engine, jobs, batch)
    work = Work(run.lengths, batch)
    limit = work.output_tokens / least_seconds(limits, footprint_of(engine), work)
    steps = f"{len(run.decode_steps)} decode steps, median {1e3 * median(run.decode_steps):.2f} ms"
    return Figure(name, run.output_tokens / run.seconds, "tok/s", limit, target, steps)


def prefill(engine: Engine, limits: Limits, prompt: int, count: int, target: float | None) -> Figure:
    """Prompt tokens a second of long prompts, one after the other."""
    jobs = Workload(prompt_tokens=prompt, output_tokens=1, token_ids=_ids(engine)).jobs(count + 1, seed=2)
    drive(engine, jobs[:1], 1)
    run = drive(engine, jobs[1:], 1)
    work = Work(run.lengths, 1)
    limit = work.prompt_tokens / prefill_seconds(limits, footprint_of(engine), work)
    return Figure(
        f"prefill, prompts of {prompt:,}",
        work.prompt_tokens / run.seconds,
        "tok/s",
        limit,
        _of(target, limit),
    )


def sampler_share(engine: Engine, rounds: int, target: float) -> Figure:
    """The sampler's part of a full captured step with filters and penalties in every row."""
    import numpy as np
    import torch

    graphs = engine.runner.graphs
    if graphs is None or not graphs.bucket_for(graphs.rows.rows):
        raise RuntimeError("the largest decode step wasn't captured")
    count = graphs.rows.rows
    lines = np.arange(count)
    graphs.rows.fill(
        count,
        {
            "rows": lines, "lines": lines, "temperature": np.full(count, 0.8), "top_k": np.full(count, 50),
            "top_p": np.full(count, 0.9), "min_p": np.full(count, 0.01), "seeds": lines,
            "repetition": np.full(count, 1.1), "presence": np.full(count, 0.2),
            "frequency": np.full(count, 0.1), "slots": np.full(count, -1), "seq_lens": np.zeros(count),
        },
    )  # fmt: skip
    with torch.inference_mode():
        graphs.logits.normal_(0, 3)
        sampling = _seconds(lambda: graphs.draw(count, "full"), rounds)
        forward = _seconds(lambda: graphs.run(count), rounds)
        graphs._counts[0].zero_()
    note = f"{1e6 * sampling:.0f} µs for {count} rows of {engine.model.logits_width:,} logits, empty contexts"
    return Figure(
        "sampler with every feature on", sampling / (sampling + forward), "of a step", None, target, note
    )


def idle_share(engine: Engine, batch: int, steps: int, target: float) -> Figure:
    """The part of the time in a steady decode in which no kernel ran, by torch's profiler.

    Raises CannotMeasure where the profiler can't be used, as on a machine that hides the GPU's counters.
    """
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    from tokenmill.engine.messages import Add
    from tokenmill.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=steps + 40, ignore_eos=True)
    jobs = Workload(prompt_tokens=64, output_tokens=1, token_ids=_ids(engine)).jobs(batch, seed=3)
    clear(engine)
    for number, job in enumerate(jobs):
        assert isinstance(job.prompt, list)
        engine.add(Add(10_000_000 + number, job.prompt, params))
    for _ in range(20):
        engine.step()
    try:
        profiler: Any = profile(activities=[ProfilerActivity.CUDA])
        profiler.start()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it knows one of the activities
        clear(engine)
        raise CannotMeasure(
            f"torch's profiler doesn't start: {' '.join(str(error).split())[:200]}"
        ) from error
    for _ in range(steps):
        engine.step()
    profiler.stop()
    clear(engine)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    if not spans:
        raise CannotMeasure("torch's profiler sees no kernel here")
    busy, whole = covered(spans)
    note = f"{len(spans)} kernels and copies over {whole / 1e3:.1f} ms, batch {batch}, profiler on"
    return Figure("idle in a steady decode", 1 - busy / whole, "of the time", None, target, note)


def covered(spans: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(time inside at least one span, time from the first begin to the last end)."""
    ordered = sorted(spans)
    busy, end = 0.0, ordered[0][0]
    for begin, stop in ordered:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy, end - ordered[0][0]


def transformers_batch(
    fields: dict[str, Any], device: Any, dtype: Any, jobs: Sequence[Job], graphs: bool | None
) -> Figure:
    """transformers' own continuous batching on jobs of one output length, in output tokens a second.

    `graphs`: with CUDA graphs or without; None leaves that to it.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from tokenmill.bench.gpu_models import build_module

    module = build_module(fields, device, dtype, "sdpa")
    prompts = [job.prompt for job in jobs]
    outputs = jobs[0].output_tokens
    make: Any = GenerationConfig
    settings = make(max_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options: Any = ContinuousBatchingConfig
    # A GPU's memory is the library's to divide; of a CPU's it would take nearly all.
    cache: dict[str, int] = {} if device.type == "cuda" else {"num_blocks": 8, "max_batch_tokens": 64}
    batching = options(use_cuda_graph=graphs, allow_block_sharing=False, **cache)
    answers = module.generate_batch(
        inputs=prompts,
        generation_config=settings,
        continuous_batching_config=batching,
        record_timestamps=True,
    )
    made = sum(len(answer.generated_tokens) for answer in answers.values())
    stamps = [stamp for answer in answers.values() for stamp in answer.timestamps or ()]
    starts = [answer.created_time for answer in answers.values()]
    if made < outputs * len(prompts) or not stamps:
        raise RuntimeError(f"{made} of {outputs * len(prompts)} tokens came back")
    name = "transformers generate_batch" + (", graphs" if graphs else "")
    return Figure(name, made / (max(stamps) - min(starts)), "tok/s")


def _seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of one call, waiting for the device."""
    import torch

    times = []
    for _ in range(rounds + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[2:])


def _of(share: float | None, limit: float) -> float | None:
    return None if share is None else share * limit


def _ids(engine: Engine) -> range:
    """Ids to make prompts of, away from the first ones, which are special in many vocabularies."""
    width = engine.model.logits_width
    return range(min(1000, width // 4), min(10_000, width))

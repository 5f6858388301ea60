"""Decode steps captured once and replayed: buckets of rows over static buffers.

    bucket      1  2  4  8  16  24  32 …          the smallest that holds a step's rows; the rest is padding
    static      positions │ slots │ rows │ … │ seq_lens      one packed copy a step        block table: when it changed
    graphs      last tokens of the rows ─▶ forward ─▶ logits ─▶ sampler (plain │ full) ─▶ tokens, flags, last tokens

Nothing in a captured step depends on a number of the host: rows, lengths and places are read from the static
buffers. A padding row has length 0, slot -1, and a line of the last tokens that is nobody's. Eager steps run the
same kernels, so text doesn't change when graphs take over.

Graphs are captured between steps, the largest first and one a call, so that a server answers from its first
second; they share one memory pool, which the largest one sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.kernel_set import Adjustments, Penalties, ReferenceKernels, Settings
from tokenmill.engine.staging import ALIGNMENT, PinnedLines

logger = logging.getLogger("tokenmill.engine")
SMALL_BUCKETS = (1, 2, 4, 8)
STEP = 8
PADDED_TOP_P = 1.0


def buckets_up_to(rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, … and `rows` itself, the largest first."""
    found = {size for size in SMALL_BUCKETS if size < rows} | set(range(16, rows, STEP)) | {rows}
    return sorted(found, reverse=True)


class Graph(Protocol):
    """Something captured."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Captures work on the device. The work runs once before, so that its kernels are compiled."""

    def __call__(self, work: Callable[[], object], /) -> Graph: ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph that isn't one: the work is called again. What tests capture with where there is no GPU."""

    work: Callable[[], object]

    def replay(self) -> None:
        self.work()


def record(work: Callable[[], object]) -> Recorded:
    """The `Capture` of `Recorded`."""
    work()
    return Recorded(work)


class CudaCapture:
    """Captures CUDA graphs in one pool, on a stream of their own; other threads may go on using the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            work()
            torch.cuda.synchronize(self._device)
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the capture is void, and says so
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize(self._device)
        return graph


class StaticRows:
    """The inputs of captured steps, on the device at addresses that stay, and how they get there."""

    FIELDS: tuple[tuple[str, type[np.generic]], ...] = (
        ("positions", np.int64), ("slots", np.int64), ("rows", np.int64), ("lines", np.int64),
        ("generated", np.int64), ("seeds", np.int64), ("top_k", np.int64), ("temperature", np.float32),
        ("min_p", np.float32), ("top_p", np.float32), ("repetition", np.float32), ("presence", np.float32),
        ("frequency", np.float32), ("seq_lens", np.int32),
    )  # fmt: skip

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        """For `rows` rows of at most `blocks` blocks; the row's line of last tokens for padding is `rows`."""
        self.rows = rows
        self._padding = {"slots": -1, "lines": -1, "rows": rows, "top_p": PADDED_TOP_P, "repetition": 1.0}
        # Aligned as a staged step's are: Triton compiles kernels anew for pointers at other places.
        sizes = [-(-rows * np.dtype(kind).itemsize // ALIGNMENT) * ALIGNMENT for _, kind in self.FIELDS]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._lines = PinnedLines(device, self._offsets[-1])
        self._views: dict[int, list[tuple[str, NDArray[Any]]]] = {}
        self._front = torch.zeros(self._offsets[-1], dtype=torch.uint8, device=device)
        self.fields: dict[str, Tensor] = {}
        for (name, kind), at, end in zip(self.FIELDS, self._offsets, self._offsets[1:], strict=False):
            self.fields[name] = self._front[at:end].view(getattr(torch, np.dtype(kind).name))[:rows]
        self.table = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self.query_start = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._known: tuple[int, bytes] | None = None
        self.pad()

    def pad(self) -> None:
        """Make every row padding."""
        self.fill(self.rows, {})

    def fill(self, bucket: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Write the first rows of each field and pad it up to `bucket`, by one copy. Missing fields are padding."""
        for name, line in self._fields_of(self._lines.take(self._offsets[-1])):
            values = arrays.get(name)
            count = 0 if values is None else len(values)
            if values is not None:
                line[:count] = values
            if count < bucket:
                line[count:bucket] = self._padding.get(name, 0)
        self._lines.send(self._front)

    def _fields_of(self, buffer: Tensor) -> list[tuple[str, NDArray[Any]]]:
        """The fields in one of the host's buffers, which are few and stay."""
        found = self._views.get(buffer.data_ptr())
        if found is None:
            host, ends = buffer.numpy(), self._offsets[1:]
            found = [
                (name, host[at:end].view(kind)[: self.rows])
                for (name, kind), at, end in zip(self.FIELDS, self._offsets, ends, strict=False)
            ]
            self._views[buffer.data_ptr()] = found
        return found

    def needs_table(self, version: int, rows: NDArray[np.int64]) -> bool:
        """Whether the block table on the device is another one than that of these slots in this version."""
        known = (version, rows.tobytes())
        changed = known != self._known
        self._known = known
        return changed

    def set_table(self, table: Tensor) -> None:
        """Take over a step's block table [R, P], already on the device. What lies beyond it is never read."""
        self.table[: table.shape[0], : table.shape[1]].copy_(table)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def first(self, count: int) -> dict[str, Tensor]:
        """The first `count` rows of each field."""
        return {name: field[:count] for name, field in self.fields.items()}


def draw_settings(fields: dict[str, Tensor]) -> Settings:
    """How rows with these fields draw."""
    temperature, min_p, top_p = fields["temperature"], fields["min_p"], fields["top_p"]
    return temperature, min_p, fields["top_k"], top_p, fields["seeds"], fields["generated"]


class DecodeForward(Protocol):
    """Logits of tokens [R] int64, one a row, into `out` [R, V]; R is also the number of rows."""

    def __call__(self, tokens: Tensor, rows: StaticRows, out: Tensor) -> Tensor: ...


class DecodeGraphs:
    """The captured decode steps of one model."""

    def __init__(
        self,
        kernels: ReferenceKernels,
        forward: DecodeForward,
        rows: StaticRows,
        logits: Tensor,
        last_tokens: Tensor,
        counts: tuple[Tensor, Tensor],
        capture: Capture,
        buckets: list[int] | None = None,
    ) -> None:
        """`logits` [rows, V] receives each step's; `last_tokens` [rows + 1]; `counts` as `Sampler.counts`.

        `buckets`: those to capture, in this order; None: all that `buckets_up_to` gives.
        """
        self.rows = rows
        self.logits = logits
        self.results = torch.zeros(2, rows.rows, dtype=torch.int64, device=logits.device)
        """Tokens and flags of the last step."""
        self._kernels = kernels
        self._forward = forward
        self._last_tokens = last_tokens
        self._counts = counts
        self._capture = capture
        self._graphs: dict[int, dict[str, Graph]] = {}
        self._missing = buckets or buckets_up_to(rows.rows)
        self._wanted = len(self._missing)

    # ---------------------------------------------------------------- capture

    @property
    def progress(self) -> float:
        """The share of the buckets that is captured."""
        return len(self._graphs) / self._wanted

    def capture_next(self) -> bool:
        """Capture the largest bucket that is missing; False when none is. Not while a step's inputs wait to run."""
        if not self._missing:
            return False
        bucket = self._missing.pop(0)
        self.rows.pad()
        try:
            self._graphs[bucket] = {
                "forward": self._capture(lambda: self._run_forward(bucket)),
                "plain": self._capture(lambda: self._draw(bucket, full=False)),
                "full": self._capture(lambda: self._draw(bucket, full=True)),
            }
        except torch.OutOfMemoryError:
            logger.warning("no memory to capture decode steps of %d rows: they run uncaptured", bucket)
        except Exception:  # whatever a driver has against capturing, the same kernels run without it
            logger.exception("decode steps can't be captured: they run uncaptured")
            self._missing.clear()
        return bool(self._missing)

    def rehearse(self) -> None:
        """Call what capturing will call, on rows that are padding; nothing is captured."""
        self.rows.pad()
        for bucket in self._missing:
            self._run_forward(bucket)
            self._draw(bucket, full=False)
            self._draw(bucket, full=True)

    def _run_forward(self, bucket: int) -> None:
        tokens = self._last_tokens[self.rows["rows"][:bucket]]
        self._forward(tokens, self.rows, self.logits[:bucket])

    def _draw(self, bucket: int, *, full: bool) -> None:
        logits, counts, rows = self.logits[:bucket], self._counts, self.rows.first(bucket)
        if full:
            rates = rows["repetition"], rows["presence"], rows["frequency"]
            penalties = Penalties(rows["lines"], *counts, *rates)
            logits = self._kernels.adjust(logits, Adjustments(penalties=(penalties,)))
        tokens, flags = self._kernels.draw(
            logits,
            draw_settings(rows),
            filtered=full,
            counted=(rows["lines"], counts[0]) if full else None,
            out=self.results[0, :bucket],
        )
        self.results[1, :bucket].copy_(flags)
        self._last_tokens.scatter_(0, rows["rows"], tokens)

    # ---------------------------------------------------------------- replay

    def bucket_for(self, rows: int) -> int:
        """The smallest captured bucket that holds `rows` rows; 0 if none does."""
        return min((bucket for bucket in self._graphs if bucket >= rows), default=0)

    def run(self, bucket: int) -> Tensor:
        """Replay the forward pass of the rows that were filled in: logits [bucket, V]."""
        self._graphs[bucket]["forward"].replay()
        return self.logits[:bucket]

    def draw(self, bucket: int, variant: str) -> None:
        """Replay a sampler, plain or full, over the last `run`'s logits; `results` has what it drew."""
        self._graphs[bucket][variant].replay()

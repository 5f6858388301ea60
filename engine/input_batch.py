"""Persistent rows of the running sequences, and the flat tensors of one step made from them.

slot   0  1  2  …            one row a running sequence; written when it starts, blocks appended as it grows
step   [chunk of slot 2][decode of slot 0][decode of slot 1]      T tokens, one sequence after the other
         logits rows:  [scored prompt positions …][one row a sampler]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.request import Sequence
from tokenmill.engine.scheduler import Chunk, Step


@dataclass(slots=True)
class ScoredPart:
    """Prompt positions of one sequence in this step's logits: rows `row` … for tokens `start` … ."""

    sequence: Sequence
    start: int
    count: int
    row: int


@dataclass(slots=True)
class SampleRow:
    """One row of logits that a token is drawn from, after `generated` tokens of its output.

    `after` are the drafts before it in this step, which count as generated; `drafts` is how many the sequence
    has in this step: with any, whether this row's token is kept is decided when all of them are known.
    """

    sequence: Sequence
    generated: int
    after: list[int]
    drafts: int


@dataclass(slots=True)
class StepInputs:
    """One step on the device. T tokens, R chunks, S scored rows followed by N sampler rows of logits."""

    input_ids: Tensor  # [T] int64; tokens still on the device are filled in from `carried`
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: places in the KV cache
    block_table: Tensor  # [R, P] int32
    seq_lens: Tensor  # [R] int32
    query_start: Tensor  # [R + 1] int32
    logits_index: Tensor  # [S + N] int64 into T
    carried: tuple[Tensor, Tensor] | None  # (places in input_ids, rows of the last tokens)
    scored: list[ScoredPart]
    targets: Tensor  # [S] int64: the prompt token that each scored row predicts
    samplers: list[SampleRow]
    rows: NDArray[np.int64]  # [N]: the samplers' slots
    generated: Tensor  # [N] int64: how many tokens each sampler drew before
    copies: tuple[Tensor, Tensor] | None  # (source, target) blocks
    constrained: bool  # whether some sampler follows a grammar


class InputBatch:
    """`max_batch` rows for sequences of at most `max_blocks` blocks of `block_size` tokens."""

    def __init__(self, max_batch: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.temperature = np.ones(max_batch, np.float32)
        self.top_p = np.ones(max_batch, np.float32)
        self.min_p = np.zeros(max_batch, np.float32)
        self.top_k = np.zeros(max_batch, np.int64)
        self.repetition = np.ones(max_batch, np.float32)
        self.presence = np.zeros(max_batch, np.float32)
        self.frequency = np.zeros(max_batch, np.float32)
        self.seed = np.zeros(max_batch, np.int64)
        self.penalized = np.zeros(max_batch, np.bool_)
        self._blocks = np.zeros((max_batch, max_blocks), np.int32)
        self._num_blocks = np.zeros(max_batch, np.int32)

    def start(self, sequence: Sequence) -> None:
        """Write the row of a sequence that just got its slot."""
        slot, params = sequence.slot, sequence.params
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = max(params.top_k, 0)
        self.repetition[slot] = params.repetition_penalty
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.seed[slot] = sequence.seed
        self.penalized[slot] = params.penalized
        self._num_blocks[slot] = 0

    def prepare(self, step: Step) -> StepInputs:
        """The tensors of one step; call it right after `schedule`, before anything else changes the sequences."""
        chunks = step.chunks
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        query_start = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        positions = np.arange(total) - np.repeat(query_start[:-1] - starts, counts)
        table = self._table(chunks)
        of_chunk = np.repeat(np.arange(len(chunks)), counts)
        slots = table[of_chunk, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        ids, carried = self._tokens(chunks, query_start, total)
        scored, scored_rows, targets = self._scored(chunks, query_start)
        samplers, last = self._samplers(chunks, query_start)
        return StepInputs(
            input_ids=self._to_device(ids),
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            block_table=self._to_device(table),
            seq_lens=self._to_device((starts + counts).astype(np.int32)),
            query_start=self._to_device(query_start.astype(np.int32)),
            logits_index=self._to_device(np.concatenate([scored_rows, last])),
            carried=carried,
            scored=scored,
            targets=self._to_device(targets),
            samplers=samplers,
            rows=np.array([row.sequence.slot for row in samplers], np.int64),
            generated=self._to_device(np.array([row.generated for row in samplers], np.int64)),
            copies=self._pairs(step.copies),
            constrained=any(row.sequence.matcher is not None for row in samplers),
        )

    def _table(self, chunks: list[Chunk]) -> NDArray[np.int32]:
        for chunk in chunks:
            sequence = chunk.sequence
            known, now = int(self._num_blocks[sequence.slot]), len(sequence.blocks)
            if now > known:
                self._blocks[sequence.slot, known:now] = sequence.blocks[known:]
                self._num_blocks[sequence.slot] = now
        rows = np.array([chunk.sequence.slot for chunk in chunks], np.int64)
        widest = max(len(chunk.sequence.blocks) for chunk in chunks)
        return self._blocks[rows, :widest]

    def _tokens(
        self, chunks: list[Chunk], query_start: NDArray[np.int64], total: int
    ) -> tuple[NDArray[np.int64], tuple[Tensor, Tensor] | None]:
        ids = np.zeros(total, np.int64)
        places, rows = [], []
        for chunk, at in zip(chunks, query_start.tolist(), strict=False):
            sequence = chunk.sequence
            known = sequence.tokens(chunk.start, chunk.start + chunk.count) + chunk.drafts
            ids[at : at + len(known)] = known
            if len(known) < chunk.count:
                places.append(at + len(known))
                rows.append(sequence.slot)
        if not places:
            return ids, None
        return ids, (self._to_device(np.array(places)), self._to_device(np.array(rows)))

    @staticmethod
    def _samplers(
        chunks: list[Chunk], query_start: NDArray[np.int64]
    ) -> tuple[list[SampleRow], NDArray[np.int64]]:
        rows: list[SampleRow] = []
        places: list[int] = []
        for chunk, end in zip(chunks, query_start[1:].tolist(), strict=True):
            drafts = len(chunk.drafts)
            for sequence in chunk.samplers:
                generated = sequence.num_generated - 1
                rows.append(SampleRow(sequence, generated, [], drafts))
                rows += [SampleRow(sequence, generated + i, chunk.drafts[:i], drafts) for i in range(1, drafts + 1)]
                places += range(end - 1 - drafts, end)
        return rows, np.array(places, np.int64)

    def _scored(
        self, chunks: list[Chunk], query_start: NDArray[np.int64]
    ) -> tuple[list[ScoredPart], NDArray[np.int64], NDArray[np.int64]]:
        parts: list[ScoredPart] = []
        rows: list[int] = []
        targets: list[int] = []
        for chunk, at in zip(chunks, query_start.tolist(), strict=False):
            sequence = chunk.sequence
            if sequence.params.prompt_logprobs is None:
                continue
            first = max(chunk.start + 1, sequence.prompt_scored)
            stop = min(chunk.start + chunk.count + 1, len(sequence.prompt))
            if first < stop:
                parts.append(ScoredPart(sequence, first, stop - first, len(rows)))
                rows += range(at + first - 1 - chunk.start, at + stop - 1 - chunk.start)
                targets += sequence.prompt[first:stop]
                sequence.prompt_scored = stop
        return parts, np.array(rows, np.int64), np.array(targets, np.int64)

    def _pairs(self, copies: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | None:
        if not copies:
            return None
        source, target = np.array(copies, np.int64).T.copy()
        return self._to_device(source), self._to_device(target)

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

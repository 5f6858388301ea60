"""Persistent rows of the running sequences, and the flat tensors of one step made from them.

slot   0  1  2  …            one row a running sequence; written when it starts, blocks appended as it grows
step   [chunk of slot 2][decode of slot 0][decode of slot 1]      T tokens, one sequence after the other
         logits rows:  [scored prompt positions …][one row a sampler]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.engine.kernel_set import Settings
from tokenmill.engine.request import Sequence
from tokenmill.engine.staging import Staging
from tokenmill.engine.step import Chunk, Step


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
    """One step on the device. T tokens, R chunks, S scored rows followed by N sampler rows of logits.

    A step that a captured graph runs reads its tokens and places from the graph's own rows: these are empty then.
    """

    input_ids: Tensor  # [T] int64; tokens still on the device are filled in from `carried`
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: places in the KV cache
    block_table: Tensor  # [R, P] int32
    seq_lens: Tensor  # [R] int32
    query_start: Tensor  # [R + 1] int32
    logits_index: Tensor  # [S + N] int64 into T
    decodes: int  # leading chunks of exactly one token
    carried: tuple[Tensor, Tensor] | None  # (places in input_ids, rows of the last tokens)
    scored: list[ScoredPart]
    targets: Tensor  # [S] int64: the prompt token that each scored row predicts
    samplers: list[SampleRow]
    rows: NDArray[np.int64]  # [N]: the samplers' slots
    generated: NDArray[np.int64]  # [N]: how many tokens each sampler drew before
    lines: Tensor  # [N] int64: `rows` on the device
    settings: Settings  # [N] each: how to draw
    copies: tuple[Tensor, Tensor] | None  # (source, target) blocks
    chunk_rows: Tensor  # [R] int64: the chunks' sequences' slots
    constrained: bool  # whether some sampler follows a grammar
    plain: bool = False  # whether nothing but temperatures tells how the samplers draw
    restores: tuple[Tensor, Tensor] | None = None  # (source, target) lines of states, before the pass
    leavings: tuple[Tensor, Tensor] | None = None  # the same after it: for children and snapshots
    bucket: int = 0  # rows of the captured graph that runs this step; 0: none does
    host: tuple[NDArray[Any], ...] = ()
    """Of an uncaptured step: `input_ids` to `logits_index` on the host, for other ranks (rank_link.py)."""


@dataclass(slots=True)
class DecodeRows:
    """One decode step on the host: R rows of one token each, every one of which draws."""

    samplers: list[SampleRow]
    rows: NDArray[np.int64]  # [R]: the sequences' slots
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    generated: NDArray[np.int64]
    table: NDArray[np.int32]  # [R, P]
    known: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    """(slots, tokens) of the inputs that the host knows; the others are on the device."""


@dataclass(slots=True)
class Repeated:
    """What a step of one token a sequence shares with the step before it, of the same sequences."""

    version: int
    slots: list[int]
    rows: NDArray[np.int64]
    lines: NDArray[np.int64]  # 0, 1, … R - 1
    starts: NDArray[np.int32]  # 0, 1, … R
    table: NDArray[np.int32]
    plain: bool
    tensors: list[Tensor]  # the table, query starts, logits rows, no targets, slots, five settings


class InputBatch:
    """`max_batch` rows for sequences of at most `max_blocks` blocks of `block_size` tokens."""

    def __init__(self, max_batch: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.device = device
        self.staging = Staging(device)
        self.version = 0
        """Changes whenever a block table does."""
        self.temperature = np.ones(max_batch, np.float32)
        self.top_p = np.ones(max_batch, np.float32)
        self.min_p = np.zeros(max_batch, np.float32)
        self.top_k = np.zeros(max_batch, np.int64)
        self.repetition = np.ones(max_batch, np.float32)
        self.presence = np.zeros(max_batch, np.float32)
        self.frequency = np.zeros(max_batch, np.float32)
        self.seed = np.zeros(max_batch, np.int64)
        self.penalized = np.zeros(max_batch, np.bool_)
        self.filtered = np.zeros(max_batch, np.bool_)
        self.scored = np.zeros(max_batch, np.bool_)
        self.min_tokens = np.zeros(max_batch, np.int64)
        self._blocks = np.zeros((max_batch, max_blocks), np.int32)
        self._num_blocks = [0] * max_batch
        self._repeated: Repeated | None = None

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
        filters = params.top_p < 1 or params.top_k > 0 or params.min_p > 0
        self.filtered[slot] = filters and not params.greedy
        self.scored[slot] = params.scored
        self.min_tokens[slot] = params.min_tokens
        self.version += 1
        self._num_blocks[slot] = 0

    def prepare(self, step: Step) -> StepInputs:
        """The tensors of one step; call it right after `schedule`, before anything else changes the sequences."""
        if (repeated := self._prepare_repeated(step)) is not None:
            return repeated
        chunks = step.chunks
        if any(a.count > 1 and b.count == 1 for a, b in pairwise(chunks)):
            chunks.sort(key=lambda chunk: chunk.count > 1)  # kernels take the single tokens first
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        query_start = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        positions = np.arange(total) - np.repeat(query_start[:-1] - starts, counts)
        chunk_rows, table = self._table(chunks)
        of_chunk = np.repeat(np.arange(len(chunks)), counts)
        slots = table[of_chunk, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        ids, carried = self._tokens(chunks, query_start, total)
        scored, scored_rows, targets = self._scored(chunks, query_start)
        samplers, last = self._samplers(chunks, query_start)
        rows = np.array([row.sequence.slot for row in samplers], np.int64)
        generated = np.array([row.generated for row in samplers], np.int64)
        arrays: list[NDArray[Any]] = [
            ids, positions, slots, table, (starts + counts).astype(np.int32), query_start.astype(np.int32),
            np.concatenate([scored_rows, last]), targets, rows, *self._settings(rows, generated), chunk_rows,
        ]  # fmt: skip
        moves = [step.restores, [*step.forks, *step.saves], step.copies]
        put = self.staging.put([*arrays, *carried, *(line for move in moves for line in pairs(move))])
        common, extra = put[: len(arrays)], iter(put[len(arrays) :])
        carried_tensors, restores, leavings, copies = (
            (next(extra), next(extra)) if there else None for there in (carried, *moves)
        )
        return StepInputs(
            input_ids=common[0],
            positions=common[1],
            slots=common[2],
            block_table=common[3],
            seq_lens=common[4],
            query_start=common[5],
            logits_index=common[6],
            decodes=int(np.count_nonzero(counts == 1)),
            carried=carried_tensors,
            scored=scored,
            targets=common[7],
            samplers=samplers,
            rows=rows,
            generated=generated,
            lines=common[8],
            settings=(common[9], common[10], common[11], common[12], common[13], common[14]),
            copies=copies,
            chunk_rows=common[15],
            restores=restores,
            leavings=leavings,
            constrained=any(row.sequence.matcher is not None for row in samplers),
            host=tuple(arrays[:7]),
        )

    def _prepare_repeated(self, step: Step) -> StepInputs | None:
        """`prepare` for a step of known tokens, one a sequence, each of which draws; None for others."""
        chunks = step.chunks
        if step.copies or step.saves or not chunks:
            return None
        tokens: list[int] = []
        samplers: list[SampleRow] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.count != 1 or chunk.drafts or chunk.samplers != [sequence]:
                return None
            tokens += sequence.tokens(chunk.start, chunk.start + 1)
            samplers.append(SampleRow(sequence, sequence.num_generated - 1, [], 0))
        if len(tokens) != len(chunks):  # some are still on the device
            return None
        same = self._same_rows(chunks)
        positions = np.array([chunk.start for chunk in chunks], np.int64)
        blocks = same.table[same.lines, positions // self.block_size].astype(np.int64)
        generated = np.array([row.generated for row in samplers], np.int64)
        ids, slots = np.array(tokens, np.int64), blocks * self.block_size + positions % self.block_size
        lengths = (positions + 1).astype(np.int32)
        put = self.staging.put([ids, positions, slots, lengths, generated])
        table, query_start, logits_index, targets, lines, *settings = same.tensors
        return StepInputs(
            input_ids=put[0],
            positions=put[1],
            slots=put[2],
            block_table=table,
            seq_lens=put[3],
            query_start=query_start,
            logits_index=logits_index,
            decodes=len(chunks),
            carried=None,
            scored=[],
            targets=targets,
            samplers=samplers,
            rows=same.rows,
            generated=generated,
            lines=lines,
            settings=(settings[0], settings[1], settings[2], settings[3], settings[4], put[4]),
            copies=None,
            chunk_rows=lines,
            constrained=any(row.sequence.matcher is not None for row in samplers),
            plain=same.plain,
            host=(ids, positions, slots, same.table, lengths, same.starts, same.lines),
        )

    def _same_rows(self, chunks: list[Chunk]) -> Repeated:
        slots, widest = self._grow(chunks)
        same = self._repeated
        if same is not None and same.version == self.version and same.slots == slots:
            return same
        rows, count = np.array(slots, np.int64), len(slots)
        lines, table = np.arange(count), self._blocks[rows, :widest]
        special = self.penalized[rows] | self.filtered[rows] | self.scored[rows] | (self.min_tokens[rows] > 0)
        starts = np.arange(count + 1, dtype=np.int32)
        settings = self._settings(rows, lines)[:-1]
        arrays: list[NDArray[Any]] = [table, starts, lines, lines[:0], rows, *settings]
        self._repeated = same = Repeated(
            self.version, slots, rows, lines, starts, table, not bool(special.any()), self.staging.put(arrays)
        )
        return same

    def _settings(self, rows: NDArray[np.int64], generated: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """How these slots draw, in the order of `kernel_set.Settings`."""
        return (
            self.temperature[rows], self.min_p[rows], self.top_k[rows], self.top_p[rows], self.seed[rows], generated
        )  # fmt: skip

    def prepare_decode(self, step: Step) -> DecodeRows:
        """Like `prepare`, on the host alone, for a step whose chunks are one token each and draw one each."""
        chunks = step.chunks
        samplers = [SampleRow(c.sequence, c.sequence.num_generated - 1, [], 0) for c in chunks]
        positions = np.array([c.start for c in chunks], np.int64)
        rows, table = self._table(chunks)
        blocks = table[np.arange(len(chunks)), positions // self.block_size].astype(np.int64)
        known = [
            (c.sequence.slot, token)
            for c in chunks
            if c.start < len(c.sequence.prompt) + len(c.sequence.output)  # else it is still on the device
            for token in c.sequence.tokens(c.start, c.start + 1)
        ]
        pairs = np.array(known, np.int64).T.copy() if known else None
        return DecodeRows(
            samplers=samplers,
            rows=rows,
            positions=positions,
            slots=blocks * self.block_size + positions % self.block_size,
            generated=np.array([row.generated for row in samplers], np.int64),
            table=table,
            known=None if pairs is None else (pairs[0], pairs[1]),
        )

    def _table(self, chunks: list[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The chunks' slots [R], and their blocks [R, P]."""
        slots, widest = self._grow(chunks)
        rows = np.array(slots, np.int64)
        return rows, self._blocks[rows, :widest]

    def _grow(self, chunks: list[Chunk]) -> tuple[list[int], int]:
        """Write down new blocks of the chunks' sequences; their slots, and the most blocks of one."""
        held, slots, widest = self._num_blocks, [], 0
        for chunk in chunks:
            sequence = chunk.sequence
            slot, now = sequence.slot, len(sequence.blocks)
            slots.append(slot)
            if now > widest:
                widest = now
            known = held[slot]
            if now > known:
                self._blocks[slot, known:now] = sequence.blocks[known:]
                held[slot] = now
                self.version += 1
        return slots, widest

    def _tokens(
        self, chunks: list[Chunk], query_start: NDArray[np.int64], total: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """Tokens that are known, and (places, slots) of those that are still on the device."""
        ids = np.zeros(total, np.int64)
        places, rows = [], []
        for chunk, at in zip(chunks, query_start.tolist(), strict=False):
            sequence = chunk.sequence
            known = sequence.tokens(chunk.start, chunk.start + chunk.count) + chunk.drafts
            ids[at : at + len(known)] = known
            if len(known) < chunk.count:
                places.append(at + len(known))
                rows.append(sequence.slot)
        return ids, [np.array(places, np.int64), np.array(rows, np.int64)] if places else []

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
                rows += [
                    SampleRow(sequence, generated + i, chunk.drafts[:i], drafts) for i in range(1, drafts + 1)
                ]
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


def pairs(copies: list[tuple[int, int]]) -> list[NDArray[np.int64]]:
    """Sources and targets of copies."""
    return list(np.array(copies, np.int64).T.copy()) if copies else []

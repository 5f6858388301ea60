"""What one step computes: plain data, made by the scheduler and run by the runner."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenmill.engine.request import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens `start` to `start + count` of one sequence, computed in this step.

    `samplers` are the sequences that draw a token from the logits of its last position: none for a chunk that
    ends inside the prompt, the sequence itself, and on the first time the children that forked from it.
    `drafts` are guessed tokens at the end of the chunk: the sequence then draws after each of them too.
    """

    sequence: Sequence
    start: int
    count: int
    samplers: list[Sequence] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """One step's work. `copies` are (source, target) blocks to copy after the forward pass (forks).

    States are copied from line to line, a running sequence's being its slot: `restores` before the pass, from a
    snapshot; after it `forks`, to a child's, and `saves`, to a snapshot.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    restores: list[tuple[int, int]] = field(default_factory=list)
    forks: list[tuple[int, int]] = field(default_factory=list)
    saves: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    """Sequences that got their slot in this step: their persistent rows must be written."""
    scored: int = 0
    """Prompt positions whose logits this step must compute for log-probabilities."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

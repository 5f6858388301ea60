"""What runs in the next step: one token budget, decodes first, chunks of prefill in what is left.

    waiting ──admit (whole prompt fits)──▶ running ──▶ finished
       ▲                                      │
       └──────── preempt (recompute) ─────────┘      youngest first, when a decode finds no block

Blocks for everything that a sequence has already (prompt, and output after a preemption) are taken when it is
admitted, so only decodes allocate later. `schedule` advances `num_computed` and `pending` at once, before the
step has run: the next step may be scheduled while this one is on the device. What comes out of a step is
recorded by `delivery.py` through `append`, `finish` and `commit`.
"""

from __future__ import annotations

from bisect import insort

from tokenmill.engine import snapshots
from tokenmill.engine.block_pool import BlockPool, Prefix
from tokenmill.engine.messages import FinishReason
from tokenmill.engine.request import Sequence, Status
from tokenmill.engine.snapshots import Snapshots
from tokenmill.engine.step import Chunk, Step


class Scheduler:
    """Owns the queues, the slots and, through the pool, the blocks."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        max_batch_tokens: int,
        score_tokens: int,
        prefix_cache: bool,
        draft_rows: int = 0,
        quiet_tokens: int = 0,
        states: Snapshots | None = None,
    ) -> None:
        """`score_tokens`: most prompt positions a step that are scored, so that logits stay bounded.

        `quiet_tokens`: the budget of a step without decodes, where it is larger: nobody's next token waits for it.
        `draft_rows`: decode rows up to which a row more costs next to nothing, so that drafts may use them.
        `states`: where layers carry states, the copies by which alone a prefix can be taken up again.
        """
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.score_tokens = score_tokens
        self.prefix_cache = prefix_cache
        self.draft_rows = draft_rows
        self.quiet_tokens = quiet_tokens
        self.states = states
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.suspects: list[Sequence] = []
        """Sequences of a step that raised: each runs alone until it has passed a step, or raises again."""
        self.preemptions = 0
        self._slots = list(range(max_batch - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence (with its children behind it)."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda s: s.order)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ---------------------------------------------------------------- one step

    def schedule(self) -> Step:
        """Choose the next step's chunks; an empty step means that nothing can run now."""
        step = Step()
        if self.suspects:
            self._schedule_alone(self.suspects[0], step)
            return step
        budget = self._schedule_decodes(step, self.max_batch_tokens)
        if not step.chunks:
            budget = max(budget, self.quiet_tokens)
        budget = self._schedule_prefills(step, budget)
        if not step.preempted:
            self._admit(step, budget)
        return step

    def _schedule_alone(self, sequence: Sequence, step: Step) -> None:
        if sequence.status is Status.WAITING:
            for other in list(self.running):
                self._preempt(other, step)
            if sequence.pending or not self._start(sequence, step):
                return
        count = self._chunk_size(sequence, self.max_batch_tokens, step)
        if count and self._grow(sequence, count, step):
            self._add_chunk(step, sequence, count)

    def _schedule_decodes(self, step: Step, budget: int) -> int:
        """One token, and what is drafted behind it, for each sequence that has just one to compute.

        All of a large batch passes here in every step, so what most of them need is said in place.
        """
        size = self.pool.block_size
        for sequence in list(self.running):
            if budget == 0:
                break
            generated, computed = len(sequence.output) + sequence.pending, sequence.num_computed
            if not generated or len(sequence.prompt) + generated - computed != 1:
                continue
            if sequence.status is not Status.RUNNING or sequence.verifying:
                continue
            if generated >= sequence.params.max_tokens or self._awaits_drafts(sequence):
                continue
            if computed < len(sequence.blocks) * size or self._grow(sequence, 1, step):
                budget -= self._add_decode(step, sequence, budget)
        return budget

    def _awaits_drafts(self, sequence: Sequence) -> bool:
        """Whether it's better to learn the pending token first, and then to guess what follows."""
        if sequence.proposer is None or not sequence.proposer.ready:
            return False
        return sequence.pending > 0 and len(self.running) < self.draft_rows

    def _add_decode(self, step: Step, sequence: Sequence, budget: int) -> int:
        drafts = [] if sequence.proposer is None else self._drafts(step, sequence, budget - 1)
        chunk = Chunk(sequence, sequence.num_computed, 1 + len(drafts), [sequence], drafts)
        step.chunks.append(chunk)
        sequence.num_computed += chunk.count
        if self.states is not None and sequence.num_computed % self.pool.block_size == 0:
            self._save(sequence, step)
        sequence.pending += 1
        sequence.verifying = bool(drafts)
        return chunk.count

    def _drafts(self, step: Step, sequence: Sequence, budget: int) -> list[int]:
        """Tokens to guess for a decode: as many as rows, blocks and lengths leave room for."""
        if sequence.proposer is None or sequence.pending:
            return []
        rows = self.draft_rows - max(step.num_tokens + 1, len(self.running))
        left = sequence.params.max_tokens - sequence.num_generated - 1
        drafts = sequence.proposer.propose(min(rows, left, budget))
        if sequence.matcher is not None:
            drafts = drafts[: sequence.matcher.allowed_prefix(drafts)]
        needed = self.pool.blocks_for(sequence.num_computed + 1 + len(drafts)) - len(sequence.blocks)
        blocks = self.pool.allocate(max(0, needed)) if drafts else []
        if blocks is None:
            return []
        sequence.blocks += blocks
        return drafts

    def _schedule_prefills(self, step: Step, budget: int) -> int:
        if len(step.chunks) == len(self.running):
            return budget
        scheduled = {id(chunk.sequence) for chunk in step.chunks}
        for sequence in self.running:
            if budget == 0:
                break
            if id(sequence) in scheduled or not self._prefilling(sequence):
                continue
            budget -= self._add_chunk(step, sequence, self._chunk_size(sequence, budget, step))
        return budget

    def _admit(self, step: Step, budget: int) -> None:
        while budget > 0 and self._slots and self.waiting:
            sequence = next((s for s in self.waiting if not s.pending), None)
            if sequence is None or (sequence.scores_prompt and step.scored >= self.score_tokens):
                return
            if not self._start(sequence, step):
                return
            budget -= self._add_chunk(step, sequence, self._chunk_size(sequence, budget, step))

    @staticmethod
    def _prefilling(sequence: Sequence) -> bool:
        """Whether there is something to compute besides the next decode token."""
        if sequence.uncomputed > 1:
            return True
        return sequence.uncomputed == 1 and not sequence.num_generated

    def _chunk_size(self, sequence: Sequence, budget: int, step: Step) -> int:
        count = min(sequence.uncomputed, budget)
        if sequence.scores_prompt:
            count = min(count, self.score_tokens - step.scored)
        if self.states is not None and (point := self._next_point(sequence)):
            count = min(count, point - sequence.num_computed)
        return count

    def _add_chunk(self, step: Step, sequence: Sequence, count: int) -> int:
        if count <= 0:
            return 0
        if sequence.scores_prompt:
            step.scored += count
        chunk = Chunk(sequence, sequence.num_computed, count)
        step.chunks.append(chunk)
        point = self._next_point(sequence) if self.states is not None else 0
        sequence.num_computed += count
        if point == sequence.num_computed > 0:
            self._save(sequence, step)
        if sequence.uncomputed == 0:
            chunk.samplers = [sequence, *self._fork(sequence, step)] if sequence.wants_token else []
            for sampler in chunk.samplers:
                sampler.pending += 1
        return count

    def _start(self, sequence: Sequence, step: Step) -> bool:
        """Give a waiting sequence a slot, its cached prefix, and blocks for all that it has; False if none fit."""
        if not self._slots:
            return False
        salt = sequence.salt
        if self.prefix_cache and sequence.reads_cache:
            prefix = self.pool.match(sequence.tokens(0, sequence.num_tokens), salt)
        else:
            prefix = self.pool.match((), salt)
        line = None
        if self.states is not None:
            prefix, line = self._resumable(sequence, prefix, self.states)
        needed = self.pool.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        spare = len(self.running)
        free = self.pool.free_blocks
        if self.running and needed + spare > free:
            return False
        blocks = self.pool.allocate(needed, prefix.blocks)
        if blocks is None:
            return False
        self.waiting.remove(sequence)
        sequence.blocks = blocks
        sequence.committed = len(prefix.blocks)
        sequence.content = prefix.name
        sequence.num_computed = len(prefix.blocks) * self.pool.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        self._run(sequence, step)
        if line is not None:
            step.restores.append((line, sequence.slot))
        return True

    def _run(self, sequence: Sequence, step: Step) -> None:
        sequence.slot = self._slots.pop()
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda s: s.order)
        step.started.append(sequence)

    def _fork(self, parent: Sequence, step: Step) -> list[Sequence]:
        """Let the children share the parent's full prompt blocks; those that don't fit prefill on their own."""
        children, parent.children = parent.children, []
        forked = []
        full = len(parent.prompt) // self.pool.block_size
        for child in children:
            partial = self.pool.blocks_for(len(parent.prompt)) - full
            blocks = self.pool.allocate(partial, parent.blocks[:full]) if self._slots else None
            if blocks is None:
                self.add(child)
                continue
            if partial:
                step.copies.append((parent.blocks[full], blocks[full]))
            child.blocks = blocks
            child.committed, child.content = 0, child.salt
            child.num_computed = parent.num_computed
            child.prompt_scored = len(parent.prompt)
            child.cached_tokens = 0
            self._run(child, step)
            step.forks.append((parent.slot, child.slot))
            forked.append(child)
        return forked

    # ---------------------------------------------------------------- states

    def _resumable(self, sequence: Sequence, prefix: Prefix, states: Snapshots) -> tuple[Prefix, int | None]:
        """What of a cached prefix is followed by a copy of the state, and that copy's line.

        Where others have had more of it than that, the place up to which they have is worth a copy.
        """
        found = len(prefix.blocks)
        while found and (line := states.find(prefix.names[found - 1])) is None:
            found -= 1
        size = self.pool.block_size
        if (len(prefix.blocks) - found) * size >= snapshots.LEAST:
            sequence.shared_until = len(prefix.blocks) * size
        return prefix.cut(sequence.salt, found), line if found else None

    def _next_point(self, sequence: Sequence) -> int:
        """Where on the way through its prompt the sequence's state is to be copied next; 0: nowhere."""
        done, size = sequence.num_computed, self.pool.block_size
        if done < sequence.shared_until:
            return sequence.shared_until
        end = len(sequence.prompt) // size * size
        begun = max(sequence.shared_until, sequence.cached_tokens or 0)
        return end if done < end and end - begun >= snapshots.LEAST else 0

    def _save(self, sequence: Sequence, step: Step) -> None:
        """Have the state copied that the sequence will have after this step."""
        assert self.states is not None
        if sequence.num_computed < snapshots.LEAST or (line := self.states.take()) is None:
            return
        step.saves.append((sequence.slot, line))
        sequence.saves.append((sequence.num_computed, line))

    def _name_state(self, sequence: Sequence) -> None:
        """A copy that follows the block just named can be found from now on, in place of the last on the way."""
        assert self.states is not None
        tokens, line = sequence.saves.pop(0)
        self.states.keep(line, sequence.content)
        if tokens > len(sequence.prompt):
            if sequence.trail is not None:
                self.states.forget(sequence.trail)
            sequence.trail = sequence.content

    # ---------------------------------------------------------------- blocks

    def _grow(self, sequence: Sequence, count: int, step: Step) -> bool:
        """Make room for `count` more tokens, preempting the youngest others; False if it was itself preempted."""
        needed = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is not None:
                sequence.blocks += blocks
                return True
            scheduled = {id(chunk.sequence) for chunk in step.chunks}
            victim = next(s for s in reversed(self.running) if id(s) not in scheduled)
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self._release(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)
        step.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        for _, line in sequence.saves:
            assert self.states is not None
            self.states.give_back(line)
        sequence.saves, sequence.trail = [], None
        sequence.blocks = []
        sequence.committed = 0
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1

    # ---------------------------------------------------------------- what came of it

    def append(self, sequence: Sequence, token: int) -> None:
        """A pending token of a sequence is known now."""
        sequence.pending -= 1
        sequence.output.append(token)

    def settle(self, chunk: Chunk, accepted: int) -> None:
        """So many of a chunk's drafts were right; what the cache holds of the others will be overwritten."""
        sequence = chunk.sequence
        sequence.verifying = False
        sequence.pending += accepted
        sequence.accepted_drafts += accepted
        sequence.rejected_drafts += len(chunk.drafts) - accepted
        if sequence.status is Status.RUNNING:
            sequence.num_computed -= len(chunk.drafts) - accepted

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Name the blocks among the first `computed` tokens, whose step has run, so that others can share them."""
        if not self.prefix_cache or sequence.status is not Status.RUNNING:
            return
        size = self.pool.block_size
        full = min(computed, len(sequence.blocks) * size) // size
        while sequence.committed < full:
            index = sequence.committed
            tokens = sequence.tokens(index * size, (index + 1) * size)
            sequence.content = self.pool.commit(sequence.blocks[index], sequence.content, tokens)
            sequence.committed += 1
            while sequence.saves and sequence.saves[0][0] <= sequence.committed * size:
                self._name_state(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> list[Sequence]:
        """End a sequence, free what it holds; returns its children that now must go their own way (none if error)."""
        if sequence.status is Status.RUNNING:
            if reason == "error":
                self.pool.discard(sequence.blocks)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = reason
        children, sequence.children = sequence.children, []
        return children

    def rewind(self, step: Step) -> None:
        """Undo a step that raised: its sequences go back to waiting and will each be tried alone."""
        for chunk in step.chunks:
            for sequence in {id(s): s for s in [chunk.sequence, *chunk.samplers]}.values():
                if sequence in chunk.samplers:
                    sequence.pending -= 1
                sequence.verifying = False
                sequence.prompt_scored = min(sequence.prompt_scored, chunk.start + 1)
                if sequence.status is Status.RUNNING:
                    self.pool.discard(sequence.blocks)
                    self._preempt(sequence, Step())
                if sequence.status is Status.WAITING and sequence not in self.suspects:
                    self.suspects.append(sequence)

    def cleared(self, sequence: Sequence) -> None:
        """A suspect drew a token in a step of its own, so it isn't what raised."""
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, slots and blocks agree."""
        self.pool.check_integrity([s.blocks for s in self.running])
        if self.states is not None:
            self.states.check_integrity([line for s in self.running for _, line in s.saves])
        slots = [s.slot for s in self.running]
        assert len(set(slots)) == len(slots), "two sequences share a slot"
        assert not set(slots) & set(self._slots), "a used slot counts as free"
        assert all(s.status is Status.RUNNING for s in self.running), "status of a running sequence"
        assert all(s.status is Status.WAITING and not s.blocks for s in self.waiting), (
            "a waiting one holds blocks"
        )
        assert self.waiting == sorted(self.waiting, key=lambda s: s.order), "waiting out of order"
        for s in self.running:
            assert s.num_computed <= len(s.blocks) * self.pool.block_size, "computed past its blocks"
            assert s.verifying or s.num_computed <= s.num_tokens, "computed more tokens than there are"
            assert s.committed * self.pool.block_size <= s.num_computed, (
                "a block was named before it was computed"
            )

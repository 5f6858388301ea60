"""The scheduler under random histories, against a model of a device that remembers every slot's content.

The simulated device checks what matters: when a chunk runs, each token before it must be in the cache blocks
that the sequence holds, whoever wrote it there; and a sequence's output must be what it would be alone. A model that
carries states has them in lines, each of which remembers the tokens that went into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine import snapshots
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.messages import Add
from tokenmill.engine.request import Sequence, Status, make_sequences
from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.snapshots import Snapshots
from tokenmill.engine.step import Chunk, Step

SIZE = 4


def next_token(history: list[int], choice: int) -> int:
    """What the simulated model says after `history`."""
    return (sum(history) * 31 + len(history) * 7 + choice) % 50


@dataclass
class Device:
    """Blocks by number, each a list of the tokens whose keys it holds; and states by line."""

    blocks: dict[int, list[int | None]] = field(default_factory=dict)
    states: dict[int, list[int]] | None = None

    def run(self, step: Step) -> list[list[int]]:
        """Compute a step: write the chunks' tokens, check what they attend to; the draws of each sampler."""
        samples = []
        self.copy_states(step.restores)
        for chunk in step.chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.count - len(chunk.drafts)
            history = everything(sequence)[:stop] + chunk.drafts
            for position in range(chunk.start, chunk.start + chunk.count):
                self.block(sequence, position)[position % SIZE] = history[position]
            seen = [self.block(sequence, p)[p % SIZE] for p in range(len(history))]
            assert seen == history, "the cache doesn't hold what the sequence attends to"
            if self.states is not None:
                carried = self.states.get(sequence.slot) if chunk.start else []
                assert carried == history[: chunk.start], "the state isn't that of what came before"
                self.states[sequence.slot] = history
            for sampler in chunk.samplers:
                samples.append(
                    [next_token(history[:n], sampler.choice) for n in range(stop, len(history) + 1)]
                )
        for source, target in step.copies:
            self.blocks[target] = list(self.blocks[source])
        self.copy_states(step.forks + step.saves)
        return samples

    def copy_states(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs if self.states is not None else ():
            self.states[target] = self.states[source]

    def block(self, sequence: Sequence, position: int) -> list[int | None]:
        return self.blocks.setdefault(sequence.blocks[position // SIZE], [None] * SIZE)


def everything(sequence: Sequence) -> list[int]:
    """Prompt, output, and the pending tokens as the simulated model will say them."""
    tokens = sequence.prompt + sequence.output
    for _ in range(sequence.pending):
        tokens = [*tokens, next_token(tokens, sequence.choice)]
    return tokens


@dataclass
class Loop:
    """The engine's loop without an engine, with the results of a step known one step later if `overlap`."""

    scheduler: Scheduler
    overlap: bool
    device: Device = field(default_factory=Device)
    live: list[Sequence] = field(default_factory=list)
    in_flight: tuple[Step, list[list[int]]] | None = None

    def add(self, sequence: Sequence) -> None:
        self.live += [sequence, *sequence.children]
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        orphans = self.scheduler.finish(sequence, "abort")
        if orphans:
            orphans[0].children = orphans[1:]
            self.scheduler.add(orphans[0])

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step.num_tokens <= max(self.scheduler.max_batch_tokens, self.scheduler.quiet_tokens)
        run = (step, self.device.run(step)) if step.chunks else None
        if self.overlap:
            run, self.in_flight = self.in_flight, run
        if run is not None:
            self.collect(*run)
        self.scheduler.check_integrity()

    def collect(self, step: Step, samples: list[list[int]]) -> None:
        draws = iter(samples)
        for chunk in step.chunks:
            self.scheduler.commit(chunk.sequence, chunk.start + chunk.count - len(chunk.drafts))
            only_scored = (
                chunk.sequence.params.max_tokens == 0 and chunk.sequence.status is not Status.FINISHED
            )
            if only_scored and chunk.start + chunk.count == len(chunk.sequence.prompt):
                for child in [chunk.sequence, *self.scheduler.finish(chunk.sequence, "length")]:
                    self.scheduler.finish(child, "length")
            for sampler in chunk.samplers:
                tokens = next(draws)
                if sampler.status is not Status.FINISHED:
                    self.record(sampler, chunk, tokens)

    def record(self, sequence: Sequence, chunk: Chunk, tokens: list[int]) -> None:
        accepted = 0
        if chunk.drafts:
            while accepted < len(chunk.drafts) and tokens[accepted] == chunk.drafts[accepted]:
                accepted += 1
            self.scheduler.settle(chunk, accepted)
        new = 0
        for token in tokens[: accepted + 1]:
            self.scheduler.append(sequence, token)
            new += 1
            if len(sequence.output) >= sequence.params.max_tokens or token == 13:
                self.scheduler.finish(sequence, "length")
                break
        if sequence.proposer is not None:
            sequence.proposer.extend(sequence.prompt + sequence.output, new)
            sequence.proposer.feedback(len(chunk.drafts), accepted)

    def drain(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_work and self.in_flight is None:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def alone(prompt: list[int], choice: int, max_tokens: int) -> list[int]:
    """The output of a sequence that nothing disturbs."""
    history = list(prompt)
    while len(history) - len(prompt) < max_tokens:
        history.append(next_token(history, choice))
        if history[-1] == 13:
            break
    return history[len(prompt) :]


def make_loop(
    blocks: int,
    batch: int,
    tokens: int,
    *,
    overlap: bool,
    cache: bool = True,
    quiet: int = 0,
    copies: int | None = None,
) -> Loop:
    """`copies`: of states, in a model whose layers carry them."""
    pool = BlockPool(blocks, SIZE)
    scheduler = Scheduler(
        pool,
        max_batch=batch,
        max_batch_tokens=tokens,
        score_tokens=8,
        prefix_cache=cache,
        draft_rows=12 if copies is None else 0,
        quiet_tokens=quiet,
        states=Snapshots(batch + 1, copies) if copies else None,
    )
    return Loop(scheduler, overlap, Device(states=None if copies is None else {}))


def sequence_of(
    number: int,
    prompt: list[int],
    max_tokens: int,
    n: int = 1,
    priority: int = 0,
    scored: bool = False,
    prediction: list[int] | None = None,
) -> Sequence:
    params = SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
    return make_sequences(Add(number, prompt, params, priority, prediction=prediction), 1, number)


def guess(data: st.DataObject, prompt: list[int]) -> list[int] | None:
    """A prediction of choice 0's output: none, right, or with some tokens changed."""
    if not data.draw(st.booleans(), "predicted"):
        return None
    tokens = alone(prompt, 0, 20)
    for _ in range(data.draw(st.integers(0, 3), "mistakes")):
        tokens[data.draw(st.integers(0, len(tokens) - 1))] += 1
    return tokens


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    go_through(data, None)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_histories_of_a_model_with_states(data: st.DataObject) -> None:
    with mock.patch.object(snapshots, "LEAST", SIZE):
        go_through(data, data.draw(st.sampled_from([0, 1, 3, 12]), "copies"))


def go_through(data: st.DataObject, copies: int | None) -> None:
    """A history of random events; `copies` as make_loop takes it."""
    blocks = data.draw(st.integers(6, 24), "blocks")
    longest = blocks * SIZE
    loop = make_loop(
        blocks,
        data.draw(st.integers(1, 6), "batch"),
        data.draw(st.integers(1, 24), "budget"),
        overlap=data.draw(st.booleans(), "overlap"),
        cache=data.draw(st.booleans(), "cache") if copies is None else copies > 0,
        copies=copies,
        quiet=data.draw(st.sampled_from([0, 30]), "quiet"),
    )
    number = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "abort", "fail"]))
        if action == "add":
            prompt = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=longest // 2))
            room = longest - len(prompt)
            max_tokens = data.draw(st.integers(0, min(room, 20)))
            n, priority, scored = data.draw(
                st.tuples(st.integers(1, 4), st.integers(-1, 1), st.booleans()), "request"
            )
            loop.add(sequence_of(number, prompt, max_tokens, n, priority, scored, guess(data, prompt)))
            number += 1
        elif action == "abort" and loop.live:
            loop.abort(data.draw(st.sampled_from(loop.live)))
        elif action == "fail":
            fail_a_step(loop)
        else:
            loop.step()
    loop.drain()
    assert loop.scheduler.pool.free_blocks == blocks
    loop.scheduler.pool.check_integrity()
    for sequence in loop.live:
        expected = alone(sequence.prompt, sequence.choice, sequence.params.max_tokens)
        if sequence.finish == "abort":
            assert sequence.output == expected[: len(sequence.output)]
        else:
            assert sequence.output == expected


def fail_a_step(loop: Loop) -> None:
    """A step raises after it was scheduled: everything in flight is undone; nobody raises again afterwards."""
    step = loop.scheduler.schedule()
    undone = [step] + ([loop.in_flight[0]] if loop.in_flight else [])
    loop.in_flight = None
    for one in undone:
        loop.scheduler.rewind(one)
    loop.scheduler.check_integrity()
    loop.scheduler.suspects.clear()


def test_decodes_come_before_prefills_and_share_the_budget() -> None:
    loop = make_loop(40, 8, 8, overlap=False)
    loop.add(sequence_of(0, [1, 2, 3], 10))
    loop.step()
    loop.add(sequence_of(1, [5] * 30, 4))
    step = loop.scheduler.schedule()
    assert [(c.sequence.request, c.count) for c in step.chunks] == [(0, 1), (1, 7)]


def test_prompts_take_longer_steps_while_nobody_decodes() -> None:
    loop = make_loop(40, 8, 8, overlap=False, quiet=20)
    loop.add(sequence_of(0, [5] * 30, 4))
    steps = []
    for _ in range(3):
        step = loop.scheduler.schedule()
        steps.append([(c.sequence.request, c.count) for c in step.chunks])
        loop.collect(step, loop.device.run(step))
        if len(steps) == 2:
            loop.add(sequence_of(1, [6] * 30, 4))
    assert steps == [[(0, 20)], [(0, 10)], [(0, 1), (1, 7)]]


def test_choices_share_one_prefill() -> None:
    loop = make_loop(40, 8, 64, overlap=False)
    loop.add(sequence_of(0, list(range(10)), 3, n=4))
    step = loop.scheduler.schedule()
    assert step.num_tokens == 10
    assert [s.choice for s in step.chunks[0].samplers] == [0, 1, 2, 3]
    assert len(step.copies) == 3
    assert loop.scheduler.pool.used_blocks == 2 + 4


def test_lower_priority_numbers_run_first() -> None:
    loop = make_loop(40, 1, 64, overlap=False)
    for number, priority in enumerate([1, 0, -1]):
        loop.add(sequence_of(number, [1, 2], 1, priority=priority))
    assert [s.request for s in loop.scheduler.waiting] == [2, 1, 0]


def test_the_youngest_is_preempted_and_resumes() -> None:
    loop = make_loop(5, 4, 64, overlap=False)
    loop.add(sequence_of(0, [0, 1, 1, 0], 12))
    loop.add(sequence_of(1, [1, 1, 0, 0], 12))
    loop.drain()
    assert loop.live[1].preemptions > 0
    assert loop.live[0].preemptions == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_suspect_runs_alone(overlap: bool) -> None:
    loop = make_loop(40, 8, 64, overlap=overlap)
    for number in range(3):
        loop.add(sequence_of(number, [number] * 5, 4))
    loop.scheduler.rewind(loop.scheduler.schedule())
    assert len(loop.scheduler.suspects) == 3
    step = loop.scheduler.schedule()
    assert [c.sequence.request for c in step.chunks] == [0]
    loop.collect(step, loop.device.run(step))
    loop.scheduler.cleared(loop.live[0])
    assert [s.request for s in loop.scheduler.suspects] == [1, 2]


def test_scored_prompts_run_in_bounded_chunks() -> None:
    loop = make_loop(40, 8, 64, overlap=False)
    loop.add(sequence_of(0, [1] * 30, 1, scored=True))
    loop.add(sequence_of(1, [2] * 30, 1, scored=True))
    step = loop.scheduler.schedule()
    assert step.scored == 8
    assert [c.count for c in step.chunks] == [8]


def test_a_right_prediction_saves_steps_and_a_wrong_one_changes_nothing() -> None:
    prompt = next([1, 2, k] for k in range(99) if len(alone([1, 2, k], 0, 40)) == 40)
    text = alone(prompt, 0, 40)
    steps = {}
    for name, prediction in {"none": None, "right": text, "wrong": [49] * 40}.items():
        loop = make_loop(40, 4, 64, overlap=False)
        loop.add(sequence_of(0, prompt, 40, prediction=prediction))
        steps[name] = 0
        while loop.scheduler.has_work:
            loop.step()
            steps[name] += 1
        assert loop.live[0].output == text
    assert steps["right"] < steps["none"] / 3
    assert steps["wrong"] == steps["none"]

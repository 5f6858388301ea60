"""The engine on a GPU that isn't there (stand_in_gpu.py): graphs, overlap, and nothing that waits or compiles.

One engine serves all tests: its pool has room for fewer tokens than its rows may grow to. What it answers is held
against the CPU's own kernels. Each test ends with the device's books: no wait, no new variant of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_models import FULL, GREEDY, MIXED, PROMPTS, SEEDED, checkpoint, on_cpu, texts
from stand_in_gpu import StandInGpu, stand_in_gpu

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.messages import Add
from tokenmill.engine.model_runner import ModelRunner
from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.staging import Fetched

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
BLOCKS = 5
LONG = [[n] * 15 for n in (40, 50, 60)]
"""Prompts that fill a block with the first token, so that the pool is too small once all three go on."""


def load(**settings: object) -> LLM:
    options: dict[str, object] = {
        "max_context": 64, "num_blocks": BLOCKS, "max_batch": 3, "max_batch_tokens": 32, "dtype": "float32",
    }  # fmt: skip
    return LLM(checkpoint(), device="cuda:0", **{**options, **settings})


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[StandInGpu, LLM, LLM]]:
    """The device, the engine on it with its steps captured, and one on the CPU."""
    reference = on_cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # its threads would read weights unseen by the stand-in
        with stand_in_gpu() as gpu:
            llm = load()
            while llm.engine.warming:
                llm.engine.warm_up_next()
            yield gpu, llm, reference


@pytest.fixture
def gpu(machine: tuple[StandInGpu, LLM, LLM]) -> StandInGpu:
    return machine[0]


@pytest.fixture
def plain(machine: tuple[StandInGpu, LLM, LLM]) -> LLM:
    return machine[2]


@pytest.fixture
def llm(machine: tuple[StandInGpu, LLM, LLM]) -> Iterator[LLM]:
    gpu, one, _ = machine
    engine = one.engine
    engine.pool.reset_cache()
    engine.scheduler.max_batch_tokens = 32
    gpu.waits.clear()
    known = set(gpu.variants)
    yield one
    assert not gpu.waits, "the host waited for the device"
    compiled = [name for key, name in gpu.variants.items() if key not in known]
    for key in set(gpu.variants) - known:
        del gpu.variants[key]
    assert not compiled, "kernels were compiled while requests waited"
    engine.scheduler.check_integrity()
    assert engine.pool.used_blocks == 0
    assert not engine.has_work


def replays(gpu: StandInGpu) -> int:
    return sum(graph.replays for graph in gpu.graphs)


def test_a_mixed_batch_replays_its_decodes(gpu: StandInGpu, llm: LLM, plain: LLM) -> None:
    """Greedy, with every filter and penalty, and seeded; overlapped, as on a GPU by itself."""
    assert llm.engine.overlap
    assert llm.engine.runner.kernels.name == "triton"
    before, late, checked = replays(gpu), gpu.late, gpu.checked
    assert texts(llm, MIXED) == texts(plain, MIXED)
    assert replays(gpu) - before >= 2 * (GREEDY.max_tokens - 1)
    assert gpu.late - late >= GREEDY.max_tokens
    assert gpu.checked > checked


def test_bias_logprobs_and_least_lengths(llm: LLM, plain: LLM) -> None:
    eos = llm.engine.model.eos_ids[0]
    params = [
        SamplingParams(temperature=0, max_tokens=3, logit_bias={17: 100}, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=4, min_tokens=2, logit_bias={eos: 100}),
    ]
    ours, theirs = (one.generate(PROMPTS[1:], params) for one in (llm, plain))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.choices[0].token_ids == other.choices[0].token_ids
    assert ours[0].choices[0].logprobs == pytest.approx(theirs[0].choices[0].logprobs, abs=1e-4)
    assert ours[0].prompt_logprobs is not None
    assert theirs[0].prompt_logprobs is not None
    assert ours[0].prompt_logprobs.values == pytest.approx(theirs[0].prompt_logprobs.values, abs=1e-4)


def test_a_grammar_beside_a_free_row(llm: LLM, plain: LLM) -> None:
    ruled = SamplingParams(temperature=0, max_tokens=3, grammar=Grammar("regex", "[a-c]{3}"))
    assert texts(llm, [ruled, SEEDED]) == texts(plain, [ruled, SEEDED])


def test_forks_and_the_best_of_them(llm: LLM, plain: LLM) -> None:
    three = SamplingParams(temperature=1, seed=2, n=1, best_of=3, max_tokens=3, ignore_eos=True)
    ours, theirs = (one.generate([PROMPTS[0]], three)[0].choices for one in (llm, plain))
    assert [choice.token_ids for choice in ours] == [choice.token_ids for choice in theirs]


def test_a_prefix_is_found_again(llm: LLM, plain: LLM) -> None:
    short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    outputs = [llm.generate([PROMPTS[0]], short)[0] for _ in range(2)]
    assert [output.cached_tokens for output in outputs] == [0, 16]
    assert outputs[0].choices[0].token_ids == outputs[1].choices[0].token_ids


def test_drafts(llm: LLM, plain: LLM) -> None:
    expected = texts(plain, [FULL])[0]
    output = llm.generate([PROMPTS[0]], FULL, predictions=[[*expected[:2], 0, *expected[3:]]])[0]
    assert output.choices[0].token_ids == expected
    assert output.accepted_drafts > 0


def test_preemption(llm: LLM, plain: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    before = llm.engine.scheduler.preemptions
    ours, theirs = (one.generate(LONG, params) for one in (llm, plain))
    assert [x.choices[0].token_ids for x in ours] == [x.choices[0].token_ids for x in theirs]
    assert llm.engine.scheduler.preemptions > before


def test_an_abort_leaves_the_others_alone(llm: LLM, plain: LLM) -> None:
    engine, found = llm.engine, list[int]()
    engine.add(Add(901, PROMPTS[1], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)))
    engine.add(Add(902, PROMPTS[2], GREEDY))
    steps = 0
    while engine.has_work:
        found += [token for delta in engine.step() if delta.request == 902 for token in delta.token_ids]
        steps += 1
        if steps == 3:
            engine.abort(901)
    assert steps < 10
    assert found == plain.generate([PROMPTS[2]], GREEDY)[0].choices[0].token_ids


def test_out_of_memory_in_a_step(llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller step follows; nobody's text changes."""
    launch, calls = llm.engine.runner.launch, list[object]()

    def short_of_memory(step: Any) -> Any:
        calls.append(step)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("none left")
        return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", short_of_memory)
    assert texts(llm, [GREEDY, SEEDED]) == texts(plain, [GREEDY, SEEDED])
    assert llm.engine.scheduler.max_batch_tokens == 16


def test_tokens_read_too_early_would_be_noticed(
    llm: LLM, plain: LLM, gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty(fetched: Fetched) -> Any:
        return [tensor.numpy().copy() for tensor in fetched.tensors]

    short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(Fetched, "wait", hasty)
        ours = llm.generate([PROMPTS[2]], short)[0].choices[0]
    gpu.run_copies(gpu.begun)
    assert ours.token_ids != plain.generate([PROMPTS[2]], short)[0].choices[0].token_ids


@pytest.mark.slow
def test_an_engine_that_warms_nothing_up_would_be_noticed(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict(gpu.variants)
    gpu.variants.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_compile_what_graphs_leave_out", lambda self, graphs: None)
        cold = load()
        while cold.engine.warming:
            cold.engine.warm_up_next()
    warm = set(gpu.variants)
    biased = SamplingParams(temperature=0, max_tokens=1, logit_bias={17: 100})
    assert texts(cold, [biased]) == [[17]]
    compiled = set(gpu.variants) - warm
    gpu.variants.clear()
    gpu.variants.update(known)
    assert compiled

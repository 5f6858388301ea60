"""The engine on the Triton kernels, run by their interpreter on CPU tensors: the same text as everywhere else.

Captured decode steps run here too, through a stand-in for CUDA graphs that calls the captured work again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from checkpoints import eager_model
from gpu_models import FULL, GREEDY, MIXED, PROMPTS, SEEDED, checkpoint, make, shared, texts

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cuda_graph import record
from tokenmill.engine.forward import PagedForward
from tokenmill.engine.messages import Add
from tokenmill.engine.sampling_params import Grammar

pytestmark = [
    pytest.mark.usefixtures("triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


@pytest.fixture
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """With its decode steps captured, unless the test says False; its cache is empty."""
    one = shared(getattr(request, "param", True))
    one.engine.pool.reset_cache()
    one.engine.overlap = False
    yield one
    one.engine.scheduler.check_integrity()
    assert one.engine.pool.used_blocks == 0


def replayed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the graphs replay from now on: buckets and samplers."""
    graphs, seen = llm.engine.runner.graphs, list[str]()
    if graphs is not None:
        run, draw = graphs.run, graphs.draw
        monkeypatch.setattr(graphs, "run", lambda bucket: (seen.append(str(bucket)), run(bucket))[1])
        monkeypatch.setattr(
            graphs, "draw", lambda bucket, variant: (seen.append(variant), draw(bucket, variant))[1]
        )
    return seen


either = pytest.mark.parametrize("llm", [False, True], ids=["uncaptured", "captured"], indirect=True)


@either
@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_equals_eager_recomputation(llm: LLM, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.engine.overlap = overlap
    seen = replayed(llm, monkeypatch)
    model = eager_model(checkpoint())
    expected = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(GREEDY.max_tokens):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            expected.append(ids[len(prompt) :])
    assert texts(llm, [GREEDY] * 3) == expected
    if llm.engine.runner.graphs is not None:
        assert set(seen) == {"4", "plain"}


@pytest.mark.parametrize(
    "llm",
    [pytest.param(False, id="uncaptured", marks=pytest.mark.slow), pytest.param(True, id="captured")],
    indirect=True,
)
def test_every_sampling_setting_draws_what_the_cpu_draws(
    llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replayed(llm, monkeypatch)
    assert texts(llm, MIXED) == texts(plain, MIXED)
    assert texts(llm, [FULL]) == texts(plain, [FULL])
    if llm.engine.runner.graphs is not None:
        assert {"1", "4", "full"} <= set(seen)


def test_bias_and_min_tokens_leave_the_captured_sampler(
    llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replayed(llm, monkeypatch)
    eos = llm.engine.model.eos_ids[0]
    params = [
        SamplingParams(temperature=0, max_tokens=5, logit_bias={17: 100}),
        SamplingParams(temperature=0, max_tokens=5, min_tokens=3, logit_bias={eos: 100}),
    ]
    expected = texts(plain, params)
    assert expected[0] == [17] * 5
    assert expected[1][3:] == [eos]
    assert texts(llm, params) == expected
    assert "plain" not in seen


def test_logprobs_agree(llm: LLM, plain: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    ours, theirs = (one.generate(PROMPTS[:2], [params, GREEDY])[0] for one in (llm, plain))
    assert ours.choices[0].token_ids == theirs.choices[0].token_ids
    assert ours.choices[0].logprobs == pytest.approx(theirs.choices[0].logprobs, abs=1e-4)
    assert [top.ids for top in ours.choices[0].top or ()] == [top.ids for top in theirs.choices[0].top or ()]
    assert ours.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    assert ours.prompt_logprobs.values == pytest.approx(theirs.prompt_logprobs.values, abs=1e-4)


def test_grammar_rows_replay_the_forward_pass_and_wait_with_sampling(
    llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replayed(llm, monkeypatch)
    ruled = SamplingParams(temperature=0, max_tokens=4, grammar=Grammar("regex", "[a-c]{4}"))
    expected = texts(plain, [ruled, SEEDED])
    assert texts(llm, [ruled, SEEDED]) == expected
    if llm.engine.runner.graphs is not None:
        assert "2" in seen


def test_buckets_are_captured_between_steps(plain: LLM) -> None:
    llm = make(False)
    engine = llm.engine
    engine.runner.make_graphs(record)
    engine.warming = True
    engine.add(Add(1, PROMPTS[0], GREEDY))
    engine.add(Add(2, PROMPTS[1], SEEDED))
    found: dict[int, list[int]] = {1: [], 2: []}
    progress = []
    while engine.has_work:
        for delta in engine.step():
            found[delta.request] += delta.token_ids
        assert engine.runner.graphs is not None
        progress.append(engine.runner.graphs.progress)
    assert found[1] == texts(plain, [GREEDY])[0]
    assert found[2] == texts(plain, [GREEDY, SEEDED])[1]
    assert progress[0] < progress[1] < progress[-1] == 1
    assert not engine.warming


def test_profiling_runs_steps_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU does at load, here with its questions about memory answered."""
    runner = shared(False).engine.runner
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
    assert isinstance(runner.forward, PagedForward)
    seen: list[tuple[int, int]] = []
    plan = runner.kernels.plan_attention
    logits = runner.forward._logits

    def watched(ids: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append((len(ids), decodes[-1]))
        return logits(ids, *args)  # type: ignore[arg-type]

    decodes: list[int] = []
    monkeypatch.setattr(runner.kernels, "plan_attention", lambda n: (decodes.append(n), plan(n))[1])
    monkeypatch.setattr(runner.forward, "_logits", watched)
    config = EngineConfig(source="", max_batch=3, max_batch_tokens=35)
    assert runner.forward._profile(runner.model, config) == 250
    assert seen == [(1, 1), (8, 1), (16, 1), (21, 1), (35, 0)]

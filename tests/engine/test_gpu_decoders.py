"""What else decodes on the Triton kernels: drafts, forks, other decoders, a model's own code (interpreted)."""

from __future__ import annotations

import pytest
from gpu_models import FULL, GREEDY, PROMPTS, SEEDED, make, on_cpu, texts

from tokenmill.engine import LLM, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", "triton")


@pytest.fixture(scope="module")
def plain() -> LLM:
    """The engine on the CPU's own kernels."""
    return on_cpu()


def test_drafts_change_nothing(plain: LLM) -> None:
    expected = texts(plain, [FULL])[0]
    wrong = [*expected[:2], 0, *expected[3:]]
    output = make(True).generate([PROMPTS[0]], FULL, predictions=[wrong])[0]
    assert output.choices[0].token_ids == expected
    assert output.accepted_drafts > 0


def test_forks_and_preemption(plain: LLM) -> None:
    three = SamplingParams(temperature=1, seed=2, n=3, max_tokens=4, ignore_eos=True)
    expected = [choice.token_ids for choice in plain.generate([PROMPTS[0]], three)[0].choices]
    llm = make(True, num_blocks=6, overlap=True)
    choices = llm.generate([PROMPTS[0]], three)[0].choices
    assert [choice.token_ids for choice in choices] == expected


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_moe", "smollm3"])
def test_other_decoders(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softcap and windows, experts, layers without RoPE."""
    ours = make(True, model_type)
    assert "fused decoder" in ours.engine.runner.forward.name
    monkeypatch.setenv("TOKENMILL_KERNELS", "torch")
    assert texts(ours, [GREEDY, SEEDED]) == texts(on_cpu(model_type), [GREEDY, SEEDED])


def test_a_models_own_code_runs_on_these_kernels(plain: LLM) -> None:
    llm = make(False, fused_decoder=False)
    assert not llm.engine.runner.can_capture
    assert texts(llm, [GREEDY] * 2) == texts(plain, [GREEDY] * 2)

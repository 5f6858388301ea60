"""What else decodes on the Triton kernels: drafts, forks, other decoders, a model's own code (interpreted)."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import tiny
from gemma4_models import gemma4
from gpu_models import (
    FULL,
    GREEDY,
    PROMPTS,
    SEEDED,
    make,
    on_cpu,
    shared,
    texts,
)
from torch import Tensor

from tokenmill.bench.gpu_models import SHAPES, load_random, shrunk
from tokenmill.engine import LLM, SamplingParams, snapshots
from tokenmill.engine.config import EngineConfig, Quantization
from tokenmill.engine.engine import Engine
from tokenmill.engine.forward import PagedForward
from tokenmill.engine.gpu_kernels import GpuKernels
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.kernels import gpu

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.usefixtures("triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


def test_drafts_change_nothing(plain: LLM) -> None:
    expected = texts(plain, [FULL])[0]
    wrong = [*expected[:2], 0, *expected[3:]]
    output = shared(True).generate([PROMPTS[0]], FULL, predictions=[wrong])[0]
    assert output.choices[0].token_ids == expected
    assert output.accepted_drafts > 0


def test_forks(plain: LLM) -> None:
    three = SamplingParams(temperature=1, seed=2, n=3, max_tokens=4, ignore_eos=True)
    expected = [choice.token_ids for choice in plain.generate([PROMPTS[0]], three)[0].choices]
    llm = make(True, overlap=True)
    choices = llm.generate([PROMPTS[0]], three)[0].choices
    assert [choice.token_ids for choice in choices] == expected


def test_preemption_changes_nothing(plain: LLM) -> None:
    """Each of three sequences needs a second block of the five as soon as its first token is drawn."""
    prompts = [[n] * 15 for n in (40, 50, 60)]
    llm = make(True, num_blocks=5, overlap=True)
    ours, theirs = (one.generate(prompts, GREEDY) for one in (llm, plain))
    assert [x.choices[0].token_ids for x in ours] == [x.choices[0].token_ids for x in theirs]
    assert llm.engine.scheduler.preemptions > 0


@pytest.mark.parametrize(
    "model_type",
    [
        *("gemma2", "qwen3_moe", "gpt_oss", "glm4_moe"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("smollm3", "ernie4_5_moe", "granitemoeshared")),
    ],
)
def test_other_decoders(model_type: str) -> None:
    """Softcap and windows, experts chosen and gated in several ways, layers without RoPE."""
    ours = make(True, model_type, max_batch=2)
    assert "fused decoder" in ours.engine.runner.forward.name
    assert texts(ours, [GREEDY, SEEDED]) == texts(on_cpu(model_type), [GREEDY, SEEDED])


@pytest.mark.parametrize("flavour", ["E2B", "26B-A4B", pytest.param("31B", marks=pytest.mark.slow)])
def test_gemma4(flavour: str) -> None:
    """Shared keys, per-layer inputs, experts beside the MLP: prompts in chunks, then captured steps with padding."""
    source, prompts = str(gemma4(flavour)), [[7, 3, 250, 99, 101], [9, 300]]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def found(llm: LLM) -> list[list[int]]:
        llm.engine.scheduler.max_batch_tokens = 4
        outputs = llm.generate(prompts, params)
        return [output.choices[0].token_ids for output in outputs]

    ours = make(True, source=source)
    assert "fused decoder" in ours.engine.runner.forward.name
    assert found(ours) == found(on_cpu(source=source))


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_5_text",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("granitemoehybrid", "lfm2", "qwen3_next", "olmo_hybrid", "bamba", "lfm2_moe")
        ),
    ],
)
def test_layers_that_carry_a_state(model_type: str) -> None:
    """Beside attention: prompts in chunks, then captured steps with a padding row, and a fork that copies states."""
    source, prompts = str(tiny(model_type, hidden=32)), [[7, 3, 250, 99, 101], [9, 300]]
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    two = SamplingParams(temperature=1, seed=2, n=2, max_tokens=3, ignore_eos=True)

    def found(llm: LLM) -> list[list[list[int]]]:
        llm.engine.scheduler.max_batch_tokens = 4
        outputs = llm.generate(prompts, [greedy, two])
        return [[choice.token_ids for choice in output.choices] for output in outputs]

    ours = make(True, source=source)
    assert "fused decoder" in ours.engine.runner.forward.name
    assert found(ours) == found(on_cpu(source=source))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text", "granitemoehybrid"])
def test_states_are_taken_up_from_copies(model_type: str) -> None:
    """Made after captured steps, too, and while a step ahead is launched already."""
    source = str(tiny(model_type, hidden=32))
    ours, plain = make(True, source=source, overlap=True), on_cpu(source=source)
    long = SamplingParams(temperature=0, max_tokens=18, ignore_eos=True)
    with mock.patch.object(snapshots, "LEAST", 16):
        prompt = [*range(40, 60)]
        for more in ([], [7, 8]):
            prompt = prompt + more
            found, wanted = (one.generate([prompt], long)[0].choices[0].token_ids for one in (ours, plain))
            assert found == wanted
            prompt += found
    assert ours.engine.scheduler.states is not None
    assert ours.engine.scheduler.states.known > 1


def test_a_models_own_code_runs_on_these_kernels(plain: LLM) -> None:
    llm = make(False, fused_decoder=False)
    assert not llm.engine.runner.can_capture
    assert texts(llm, [GREEDY] * 2) == texts(plain, [GREEDY] * 2)


@cache
def logits_with(quantization: Quantization | None) -> Tensor:
    """Logits of a short text; int4 groups 64 inputs, so this model is wide enough for two of them."""
    fields = shrunk(SHAPES["Llama-3.1-8B"]) | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    return PagedForward(
        load_random(fields, CPU, torch.float32, 64),
        EngineConfig(source="random", quantization=quantization, max_context=64, max_batch=1, num_blocks=8),
        GpuKernels(CPU, torch.float32, quantization=quantization),
    ).teacher_forced(torch.arange(20, 31), [10, 1])


@pytest.mark.parametrize(
    ("quantization", "most"), [("fp8", 0.08), ("fp8_dynamic", 0.12), ("int8", 0.03), ("int4", 0.3)]
)
def test_quantized_weights_change_logits_a_little(quantization: Quantization, most: float) -> None:
    exact = logits_with(None)
    error = float((logits_with(quantization) - exact).norm() / exact.norm())
    assert 0 < error < most


def test_norms_round_the_rows_that_8_bit_products_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what the products would have made of them; the last norm, before the head, doesn't."""
    fields = shrunk(SHAPES["Llama-3.1-8B"])
    fused: list[torch.Size] = []
    rms_norm_rows = gpu.rms_norm_rows

    def noticed(x: torch.Tensor, *arguments: Any) -> Any:
        fused.append(x.shape)
        return rms_norm_rows(x, *arguments)

    def logits() -> torch.Tensor:
        model = load_random(fields, CPU, torch.float32, 64)
        config = EngineConfig(
            source="random", quantization="fp8_dynamic", max_context=64, max_batch=1, num_blocks=8
        )
        kernels = GpuKernels(CPU, torch.float32, quantization="fp8_dynamic")
        return PagedForward(model, config, kernels).teacher_forced(torch.arange(20, 31), [10, 1])

    monkeypatch.setattr(gpu, "rms_norm_rows", noticed)
    ours = logits()
    assert len(fused) == 2 * 2 * fields["num_hidden_layers"]
    monkeypatch.setattr(GpuKernels, "make_norm", ReferenceKernels.make_norm)
    assert torch.equal(logits(), ours)
    assert len(fused) == 2 * 2 * fields["num_hidden_layers"]


def test_products_of_few_rows_norm_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launch of the norm, to the bit what it would have handed them; many rows get it."""
    fields = shrunk(SHAPES["Llama-3.1-8B"])
    alone: list[int] = []
    rms_norm = gpu.rms_norm

    def noticed(x: torch.Tensor, *arguments: Any) -> Any:
        alone.append(len(x))
        return rms_norm(x, *arguments)

    def logits(dtype: torch.dtype) -> torch.Tensor:
        model = load_random(fields, CPU, dtype, 64)
        config = EngineConfig(source="random", max_context=64, max_batch=1, num_blocks=8)
        forward = PagedForward(model, config, GpuKernels(CPU, dtype))
        return forward.teacher_forced(torch.arange(20, 38), [9, 8, 1])

    monkeypatch.setattr(gpu, "rms_norm", noticed)
    ours = [logits(dtype) for dtype in (torch.float32, torch.bfloat16)]
    norms = 2 * fields["num_hidden_layers"] + 1
    assert alone == [9] * 2 * norms
    monkeypatch.setattr(GpuKernels, "make_norm", ReferenceKernels.make_norm)
    assert torch.equal(logits(torch.float32), ours[0])
    assert torch.equal(logits(torch.bfloat16), ours[1])
    assert alone.count(1) == 2 * norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_exact_and_the_same_in_any_crowd(dtype: torch.dtype) -> None:
    """In float32 from rows of either type, also where a checkpoint keeps its router in float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 96, generator=generator).bfloat16().to(dtype)
    bias = torch.randn(6, generator=generator)
    for held in (dtype, torch.float32):
        weight = torch.randn(6, 96, generator=generator).to(held)
        router = GpuKernels(CPU, dtype).make_router(weight, bias)
        logits = router(x)
        assert logits.dtype is torch.float32
        exact = x.double() @ weight.double().T + bias
        assert float((logits - exact).abs().max()) < 1e-5
        assert torch.equal(router(x[7:8]), logits[7:8])
        assert torch.equal(router(x[:20]), logits[:20])


def test_8_bit_activations_are_refused_for_a_mixture_of_experts() -> None:
    kernels = GpuKernels(CPU, torch.float32, quantization="fp8_dynamic")
    with pytest.raises(LoadError, match="fp8_dynamic isn't done for a mixture of experts yet; say fp8"):
        kernels.make_mixture(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4), "silu")


def test_quantization_is_refused_where_it_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        source="random", quantization="fp8", max_context=64, num_blocks=8, fused_decoder=False
    )
    model = load_random(shrunk(SHAPES["Qwen3-0.6B"]), CPU, torch.float32, 64)
    with pytest.raises(LoadError, match="fp8 needs the fused decoder, which doesn't run a qwen3"):
        Engine(config, model=model)
    monkeypatch.setenv("TOKENMILL_KERNELS", "cpu")
    with pytest.raises(LoadError, match="the cpu kernels, which run here, have no quantization fp8"):
        Engine(config, model=model)

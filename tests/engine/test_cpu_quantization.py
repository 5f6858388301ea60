"""int8 and int4 weights on a CPU, against the same weights unpacked and run in full by the reference kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from checkpoints import tiny
from torch import Tensor

from tokenmill.engine import LLM, SamplingParams, cpu_products
from tokenmill.engine.config import Quantization
from tokenmill.engine.cpu_kernels import CpuKernels
from tokenmill.engine.kernel_set import Mixture, Product, ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.kernels.cpu.isa import InstructionSet, supported
from tokenmill.kernels.cpu.library import using

TYPES = (
    "llama",
    "qwen2",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "glm4_moe",
    "gemma2",
    "gemma4_text",
    "phi3",
    "starcoder2",
    "olmo2",
    "cohere",
    "granite",
)
PROMPT = [7, 3, 250, 99, 101, 14, 15, 16, 200, 201, 12, 55, 56, 57, 58, 59, 60, 61, 90, 91]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=20, ignore_eos=True, logprobs=4)


def full(product: cpu_products.CpuProduct) -> Tensor:
    """The values that a packed weight stands for, float32."""
    packed = product.packed
    assert packed is not None
    return packed.rows(torch.arange(packed.struct.outputs), torch.float32)


class UnpackedKernels(ReferenceKernels):
    """Plain torch over what the packed weights stand for."""

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self.quantizations = CpuKernels.quantizations

    def make_linear(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gate: str | None
    ) -> Product:
        unpacked = [full(cpu_products.pack([w], [None], None, self.quantization)) for w in weights]
        return super().make_linear(unpacked, biases, gate)

    def make_exact(self, weight: Tensor, bias: Tensor | None) -> Product:
        return super().make_linear([weight], [bias], None)

    def make_head(self, weight: Tensor, bias: Tensor | None) -> Product:
        self.head = full(cpu_products.pack_head(weight, None, self.quantization))
        return super().make_linear([self.head], [bias], None)

    def make_embedding(self, weight: Tensor, head: Product | None) -> object:
        return super().make_embedding(weight if head is None else self.head, None)

    def make_mixture(
        self, gate_up: Tensor, down: Tensor, activation: str, **biases: Tensor | None
    ) -> Mixture:
        unpacked = [
            torch.stack([full(cpu_products.pack([w], [None], None, self.quantization)) for w in stack])
            for stack in (gate_up, down)
        ]
        return super().make_mixture(*unpacked, activation, **biases)


def quantized(
    model_type: str, quantization: Quantization | None, dtype: str = "float32", **options: object
) -> LLM:
    return LLM(
        str(tiny(model_type)),
        quantization=quantization,
        dtype=dtype,
        max_context=128,
        num_blocks=300,
        **options,
    )


def unpacked(model_type: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch) -> LLM:
    kernels = UnpackedKernels(quantization)
    with monkeypatch.context() as patched:
        patched.setattr("tokenmill.engine.kernel_choice.select_kernels", lambda *_, **__: kernels)
        return quantized(model_type, quantization)


def prompts(count: int) -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.randrange(300) for _ in range(generator.randrange(1, 60))] for _ in range(count)]


def agree(ours: LLM, theirs: LLM, tolerance: float) -> None:
    """The same greedy texts with the same log-probabilities."""
    for one, other in zip(*(llm.generate(prompts(5), GREEDY) for llm in (ours, theirs)), strict=True):
        found, wanted = one.choices[0], other.choices[0]
        assert found.token_ids == wanted.token_ids
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=tolerance)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_its_unpacked_weights(
    model_type: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = quantized(model_type, quantization)
    assert ours.engine.runner.forward.name == "fused decoder, cpu kernels"
    agree(ours, unpacked(model_type, quantization, monkeypatch), 5e-5)


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_instruction_set(
    quantization: Quantization, isa: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with using(isa):
        agree(quantized("llama", quantization), unpacked("llama", quantization, monkeypatch), 5e-5)


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.03), ("int4", 0.3)])
def test_bfloat16_is_near_the_weights_in_full(quantization: Quantization, most: float) -> None:
    """The error is the rounding's: 8 bits change log-probabilities a little, 4 bits more."""
    exact, rounded = (
        LLM(
            str(tiny("llama", hidden_size=128)),
            quantization=q,
            dtype="bfloat16",
            max_context=64,
            num_blocks=20,
        )
        for q in (None, quantization)
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    wanted, found = (
        torch.tensor(llm.generate(prompts(1), params)[0].prompt_logprobs.values) for llm in (exact, rounded)
    )
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_same_bits_in_any_crowd(quantization: Quantization, dtype: str) -> None:
    llm = quantized("qwen3", quantization, dtype)
    alone = llm.generate([PROMPT], SEEDED)[0].choices[0]
    others = prompts(24)
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=3 + 2 * i) for i in range(len(others))]
    for chunk in (512, 40, 5):
        llm.engine.scheduler.max_batch_tokens = chunk
        llm.engine.pool.reset_cache()
        for output in llm.generate([*others, PROMPT, PROMPT], [*params, SEEDED, SEEDED])[-2:]:
            choice = output.choices[0]
            assert choice.token_ids == alone.token_ids
            assert choice.logprobs == alone.logprobs
            assert choice.top == alone.top


def test_fingerprints_differ() -> None:
    prints = {quantized("llama", q).engine.model.fingerprint for q in (None, "int8", "int4")}
    assert len(prints) == 3


def test_weights_are_kept_once() -> None:
    """Packed, nothing of the module is left; and 4 bits take 5, with the groups' scales and minima."""
    llm = quantized("llama", "int4", "bfloat16")
    assert llm.engine.model.module is None
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    packed = cpu_products.pack([weight], [None], None, "int4").packed
    assert packed is not None
    assert packed.data.numel() * 8 == weight.numel() * 5


def test_refused_where_the_decoder_cannot_run() -> None:
    with pytest.raises(
        LoadError, match="quantization int8 needs the fused decoder, which doesn't run a gpt2"
    ):
        quantized("gpt2", "int8")
    with pytest.raises(
        LoadError, match="quantization int4 needs the fused decoder, which doesn't run a mamba"
    ):
        quantized("mamba", "int4")


def test_refused_on_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", "torch")
    with pytest.raises(LoadError, match="the torch kernels, which run here, have no quantization int8"):
        quantized("llama", "int8")

"""Ranks on the Triton kernels, which Triton's interpreter runs on a CPU: what a GPU would do, but for NCCL."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here and by the other rank

import pytest
from checkpoints import tiny

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.gpu_kernels import GpuKernels

PROMPTS = [[5, 6, 7, 8, 9], [3]]


@pytest.mark.parametrize("model_type", [pytest.param("llama", marks=pytest.mark.slow), "qwen3_moe"])
def test_two_ranks_write_what_plain_torch_writes(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    found = []
    for kernels, ranks in (("torch", 1), ("triton", 2)):
        monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
        llm = LLM(
            str(tiny(model_type)),
            max_context=64,
            num_blocks=8,
            max_batch=4,
            dtype="float32",
            device="cpu",
            tensor_parallel=ranks,
            overlap=True,
        )
        assert isinstance(llm.engine.runner.kernels, GpuKernels) == (kernels == "triton")
        found.append([output.choices[0] for output in llm.generate(PROMPTS, params)])
        llm.close()
    for one, two in zip(*found, strict=True):
        assert two.token_ids == one.token_ids
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-5)

"""Engines on the Triton kernels in their interpreter, for tests: tiny models, few tokens."""

from __future__ import annotations

import os
from functools import cache

os.environ["TRITON_INTERPRET"] = "1"

import pytest
from checkpoints import tiny

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.cuda_graph import record

PROMPTS = [[7, 3, 250, 99, 101, 14, 15, 16, 200, 201, 12, 55, 56, 57, 58, 59, 60, 61], [9, 300, 5], [1]]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
FULL = SamplingParams(
    temperature=1.1, top_p=0.95, top_k=100, min_p=0.001, seed=1234, max_tokens=4, ignore_eos=True,
    presence_penalty=0.4, frequency_penalty=0.2, repetition_penalty=1.1,
)  # fmt: skip
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=4, ignore_eos=True)
MIXED = [GREEDY, FULL, SEEDED]


def checkpoint(model_type: str = "llama") -> str:
    """Small, since the interpreter takes a millisecond a program; one layer where all are alike."""
    return str(tiny(model_type, layers=1, hidden=32))


def make(graphs: bool, model_type: str = "llama", source: str | None = None, **settings: object) -> LLM:
    options: dict[str, object] = {"max_context": 64, "num_blocks": 24, "max_batch": 4, "dtype": "float32"}
    llm = LLM(source or checkpoint(model_type), **{**options, **settings})
    assert llm.engine.runner.kernels.name == "triton"
    if graphs:
        llm.engine.runner.make_graphs(record)
        while llm.engine.runner.capture_next():
            pass
    return llm


@cache
def shared(graphs: bool) -> LLM:
    """An engine that tests share: they leave its settings as they were."""
    return make(graphs)


@cache
def on_cpu(model_type: str = "llama", source: str | None = None) -> LLM:
    """A shared engine on the CPU's own kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TOKENMILL_KERNELS", raising=False)
        return LLM(
            source or checkpoint(model_type), max_context=64, num_blocks=24, max_batch=4, dtype="float32"
        )


def texts(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.choices[0].token_ids for output in llm.generate(PROMPTS[: len(params)], params)]

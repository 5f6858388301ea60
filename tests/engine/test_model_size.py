"""How much of a model a step reads."""

from __future__ import annotations

import pytest
from checkpoints import load, tiny

from tokenmill.engine.model_size import in_words


@pytest.mark.parametrize(
    ("parameters", "words"),
    [(23_100, "0.0231M"), (134_515_008, "135M"), (999_400_000, "999M"), (999_900_000, "1.0B"), (7e9, "7.0B")],
)
def test_parameters_in_words(parameters: int, words: str) -> None:
    assert in_words(parameters) == words


@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", "glm4_moe", "ernie4_5_moe", "granitemoeshared", "dots1", "exaone_moe", "qwen3_moe"],
)
def test_a_token_meets_two_experts_of_four(model_type: str) -> None:
    size = load(tiny(model_type), dtype="float32").size
    assert size.expert_share == 0.5
    assert size.expert_weights > 0
    assert size.expert_bytes == 4 * size.expert_weights


def test_biases_of_experts_are_not_rounded() -> None:
    size = load(tiny("gpt_oss"), dtype="float32", quantization="int8").size
    matrices, biases = 2 * 4 * 64 * 128 * 3, 2 * 4 * (256 + 64)
    assert size.expert_weights == matrices + biases
    assert size.expert_bytes == matrices + 4 * biases

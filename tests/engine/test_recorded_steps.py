"""On a CPU the steps of these types are one call each, and bring what the decoder brings operation by operation."""

from __future__ import annotations

import pytest
import torch
from checkpoints import tiny

from tokenmill.engine import LLM, SamplingParams, cpu_tape

MIXTURES = (
    *(
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "glm4_moe",
        "ernie4_5_moe",
        "granitemoeshared",
        "minimax_m2",
    ),
    *("dots1", "exaone_moe", "gpt_oss", "hy_v3"),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", *MIXTURES])
def test_a_recorded_step_is_the_same_bits(
    model_type: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(300, (n,), generator=generator).tolist() for n in (1, 5, 40)]
    found = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(cpu_tape, "record", lambda *_: None)
        llm = LLM(str(tiny(model_type)), dtype=dtype, max_context=128, num_blocks=100)
        forward = llm.engine.runner.forward
        assert type(forward._logits) is (cpu_tape.TapedDecoder if recorded else cpu_tape.Decoder)
        outputs = llm.generate(prompts, params)
        found.append([(o.choices[0].token_ids, o.choices[0].logprobs) for o in outputs])
    assert found[0] == found[1]

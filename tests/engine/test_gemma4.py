"""Gemma 4 in the fused decoder: the text is transformers', on each kernel set, whatever the engine does."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import eager_model, load, texts
from gemma4_models import FLAVOURS, gemma4

from tokenmill.engine import LLM, SamplingParams, attention, cpu_tape, guards
from tokenmill.engine.attention import LayerSpec
from tokenmill.engine.cpu_tape import TapedDecoder
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.decoder_spec import Attention, DecoderSpec, Norm, replace_tensors
from tokenmill.engine.describe import describe, kept_by
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.kv_cache import allocate, block_bytes
from tokenmill.kernels import reference as reference_kernels

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def engine_of(flavour: str, **options: Any) -> LLM:
    settings = {"max_context": 128, "num_blocks": 100, "max_batch": 8, "dtype": "float32", **options}
    return LLM(str(gemma4(flavour)), **settings)


def described(flavour: str) -> DecoderSpec:
    model = load(gemma4(flavour), dtype="float32", max_context=128)
    assert model.module is not None
    assert model.verdict.decoder == "halves"
    return describe(model.module, attention.probe_layers(model.module), model.max_context)


@cache
def reference(flavour: str) -> Any:
    return eager_model(gemma4(flavour))


def prompts() -> list[list[int]]:
    generator = random.Random(11)
    return [[generator.randrange(3, 320) for _ in range(n)] for n in (1, 2, 17, 40, 33, 8)]


def tokens_of(llm: LLM, ids: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    found = [output.choices[0].token_ids for output in llm.generate(ids, params)]
    llm.engine.scheduler.check_integrity()
    assert llm.engine.pool.used_blocks == 0
    return found


def require_greedy(flavour: str, ids: list[list[int]], found: list[list[int]]) -> None:
    for prompt, text in zip(ids, found, strict=True):
        with torch.inference_mode():
            logits = reference(flavour)(torch.tensor([prompt + text]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == text


def error_of(spec: DecoderSpec, flavour: str) -> float:
    """How far logits of chunks, mixed batches and single tokens are from those of whole texts."""
    ids, kept = texts(spec.head.weight.shape[0]), kept_by(spec)
    with torch.inference_mode():
        found = guards.run_paged(Decoder(spec, ReferenceKernels()), kept, ids)
        wanted = [reference(flavour)(text[None], use_cache=False).logits[0] for text in ids]
    return guards.relative_error(found, wanted)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_are_transformers(flavour: str) -> None:
    assert error_of(described(flavour), flavour) < 1e-5


def each_attention(change: Callable[[Attention], None]) -> Callable[[DecoderSpec], None]:
    def spoil(spec: DecoderSpec) -> None:
        for layer in spec.layers:
            assert isinstance(layer.mixer, Attention)
            change(layer.mixer)

    return spoil


def look_up_the_first(part: Attention) -> None:
    part.shares = None if part.shares is None else part.shares - 2


def without_value_norm(part: Attention) -> None:
    part.value_norm = False


def without_scale(spec: DecoderSpec) -> None:
    for layer in spec.layers:
        layer.out_scale = 1.0


def without_table(spec: DecoderSpec) -> None:
    assert spec.inputs is not None
    spec.inputs.scale = 0.0


def without_gains(spec: DecoderSpec) -> None:
    for layer in spec.layers:
        assert layer.beside is not None
        layer.beside.experts.routing.gains = None


def without_router_scale(spec: DecoderSpec) -> None:
    for layer in spec.layers:
        assert layer.beside is not None
        norm = layer.beside.router_in
        layer.beside.router_in = Norm(torch.ones_like(norm.weight), norm.eps)


SPOILT: list[tuple[str, Callable[[DecoderSpec], None]]] = [
    ("E2B", each_attention(look_up_the_first)),
    ("E2B", each_attention(without_value_norm)),
    ("E2B", without_scale),
    ("E2B", without_table),
    ("31B", each_attention(without_value_norm)),
    ("26B-A4B", without_gains),
    ("26B-A4B", without_router_scale),
]


@pytest.mark.parametrize(("flavour", "spoil"), SPOILT)
def test_a_twin_shows_a_part_that_is_read_wrong(
    flavour: str, spoil: Callable[[DecoderSpec], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(gemma4(flavour), dtype="float32")
    assert model.module is not None
    fields = guards.twin_fields(model.module.config)
    judge = lambda: guards.judge(type(model.module), fields, None).decoder  # noqa: E731
    assert judge() == "halves"

    def wrongly(*args: Any) -> DecoderSpec:
        spec = describe(*args)
        spoil(spec)
        return spec

    monkeypatch.setattr(guards.describe, "describe", wrongly)
    assert judge() is None


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_text_is_transformers_in_one_batch_in_chunks_and_overlapped(
    flavour: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
    llm = engine_of(flavour)
    forward: Any = llm.engine.runner.forward
    assert forward.name == f"fused decoder, {kernels} kernels"
    assert isinstance(forward._logits, TapedDecoder) == (kernels == "cpu")
    ids = prompts()
    found = tokens_of(llm, ids)
    require_greedy(flavour, ids, found)
    assert tokens_of(llm, ids) == found, "with prefix hits"
    llm.engine.pool.reset_cache()
    llm.engine.scheduler.max_batch_tokens = 7
    assert tokens_of(llm, ids) == found, "chunks of 7"
    llm.engine.overlap = True
    assert tokens_of(llm, ids) == found, "overlapped"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_survives_preemption(flavour: str) -> None:
    crowded, ids = engine_of(flavour, num_blocks=8), prompts()
    found = tokens_of(crowded, ids, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    require_greedy(flavour, ids, found)
    assert crowded.engine.scheduler.preemptions > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_recorded_step_is_the_same_bits(flavour: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
    found = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(cpu_tape, "record", lambda *_: None)
        llm = engine_of(flavour, dtype=dtype)
        forward: Any = llm.engine.runner.forward
        assert isinstance(forward._logits, TapedDecoder) == recorded
        outputs = llm.generate(prompts(), params)
        found.append([(o.choices[0].token_ids, o.choices[0].logprobs) for o in outputs])
    assert found[0] == found[1]


def test_layers_that_share_keys_take_no_cache() -> None:
    kept = kept_by(described("E2B"))
    assert kept == [
        *[LayerSpec(1, 16, 16, 8), LayerSpec(1, 32, 32)] * 2,
        LayerSpec(0, 16, 16, 8),
        LayerSpec(0, 32, 32),
    ]
    assert block_bytes(kept, 16, torch.float32) == 2 * 2 * (16 + 32) * 16 * 4
    cache = allocate(kept, 4, 16, torch.float32, torch.device("cpu"))
    assert [sum(part.nbytes for part in pair) > 0 for pair in cache.caches] == [True] * 4 + [False] * 2


def test_keys_that_are_values_are_one_weight() -> None:
    first, second = (layer.mixer for layer in described("31B").layers)
    assert isinstance(first, Attention)
    assert isinstance(second, Attention)
    assert first.qkv[1].weight is not first.qkv[2].weight
    assert second.qkv[1].weight is second.qkv[2].weight


def test_the_table_of_inputs_stays_where_it_is_mapped() -> None:
    """Not copied, not packed, and no part of what a step reads."""
    model = load(gemma4("E2B"), dtype="float32", max_context=128)
    assert model.module is not None
    table = model.module.model.embed_tokens_per_layer.weight
    everything = sum(p.numel() for p in model.module.parameters() if p.dim() > 1)
    embedding = model.module.get_input_embeddings().weight
    assert model.size.weights == everything - table.numel() - embedding.numel()
    held: list[int] = []

    class Kernels(ReferenceKernels):
        def make_embedding(self, weight: Any, head: Any) -> Any:
            held.append(weight.data_ptr())
            return super().make_embedding(weight, head)

    spec = describe(model.module, attention.probe_layers(model.module), 128)
    Decoder(spec, Kernels())
    assert table.data_ptr() in held
    left: list[int] = []
    replace_tensors(spec, lambda tensor: left.append(tensor.data_ptr()) or tensor)
    assert table.data_ptr() not in left


def test_layers_that_share_keys_run_on_the_rows_with_logits_alone() -> None:
    """They bring nothing to later tokens. Where rows with logits aren't few, on all."""
    spec = described("E2B")
    kept, counts = kept_by(spec), [12, 9]
    decoder, rows = Decoder(spec, ReferenceKernels()), []

    def attend(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        rows.append(len(query))
        return reference_kernels.paged_attention(query, *arguments, **options)

    ids = torch.randint(3, 300, (sum(counts),), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(count) for count in counts])
    slots = torch.cat([torch.arange(count) + 16 * (1 + i) for i, count in enumerate(counts)])

    def logits(index: torch.Tensor | None) -> torch.Tensor:
        rows.clear()
        metadata = attention.AttentionMetadata(
            kernels=SimpleNamespace(paged_attention=attend, store_kv=reference_kernels.store_kv),
            caches=allocate(kept, 2, 16, torch.float32, torch.device("cpu")).caches,
            slots=slots,
            block_table=torch.tensor([[1], [2]], dtype=torch.int32),
            seq_lens=torch.tensor(counts, dtype=torch.int32),
            query_start=torch.tensor([0, 12, 21], dtype=torch.int32),
        )
        with torch.inference_mode():
            return decoder(ids, positions, metadata, index)

    whole = logits(None)
    assert rows == [21] * 6
    for picked, narrow in (([20, 3, 11], 3), ([11, 11], 2), ([], 0), (list(range(6)), 21)):
        index = torch.tensor(picked, dtype=torch.int64)
        torch.testing.assert_close(logits(index), whole[index], rtol=1e-5, atol=1e-5)
        assert rows == [21] * 4 + [narrow] * 2


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_recorded_step_narrows_where_layers_share_keys(flavour: str) -> None:
    forward: Any = engine_of(flavour).engine.runner.forward
    assert forward._logits._tape.narrows == (flavour == "E2B")


def test_logprobs_of_a_prompt_are_transformers() -> None:
    """Rows with logits are many then, and not in the order of the tokens."""
    llm, ids = engine_of("E2B"), prompts()[2:4]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    for prompt, output in zip(ids, llm.generate(ids, params), strict=True):
        with torch.inference_mode():
            logits = reference("E2B")(torch.tensor([prompt]), use_cache=False).logits[0]
        wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).flatten()
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs.values == pytest.approx(wanted.tolist(), abs=1e-4)

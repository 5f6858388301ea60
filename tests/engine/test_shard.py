"""The parts of a decoder that ranks hold add up to the whole. Ranks are threads here, so no process is started."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny
from gemma4_models import FLAVOURS, gemma4
from torch import Tensor
from waiting import PATIENCE_S

from tokenmill.engine import attention, decoder_spec, guards, loader
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.decoder import Decoder
from tokenmill.engine.describe import describe
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.parallel_forward import Together
from tokenmill.engine.shard import Share, refuse_uneven, shard

CPU = torch.device("cpu")
TYPES = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "cohere", "glm4", "granite",
    "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe", "ernie4_5_moe", "granitemoeshared",
]  # fmt: skip
TEXTS = [torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in guards.LENGTHS]


class Meeting:
    """What `size` threads do together; each gets its own `Seat`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.brought: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)


class Seat:
    """Ranks' methods for one of the threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank = meeting, rank

    def _together(self, x: Tensor, join: Callable[[list[Tensor]], Any]) -> Any:
        meeting = self._meeting
        meeting.brought[self.rank] = x
        meeting.barrier.wait()
        joined = join(meeting.brought)
        meeting.barrier.wait()
        return joined

    def add_up(self, x: Tensor) -> Tensor:
        result: Tensor = self._together(x, lambda parts: torch.stack(parts).sum(0))
        return result

    def gather(self, x: Tensor) -> list[Tensor]:
        parts: list[Tensor] = self._together(x.clone(), list)
        return parts if self.rank == 0 else []


def described(folder: Path) -> tuple[decoder_spec.DecoderSpec, list[attention.LayerSpec]]:
    model = loader.load(EngineConfig(source=str(folder), dtype="float32", max_context=128), lambda *_: None)
    assert model.module is not None
    layers = attention.probe_layers(model.module)
    form = model.verdict.decoder == "interleaved"
    return describe(model.module, layers, model.max_context, form), layers


def logits_of_ranks(folder: Path, size: int) -> list[Tensor]:
    """Rank 0's logits of `TEXTS`."""
    whole, _layers = described(folder)
    width = whole.head.weight.shape[0]
    meeting = Meeting(size)

    @torch.inference_mode()
    def one(rank: int) -> list[Tensor]:
        part = copy.deepcopy(whole)
        own = shard(part, Share(rank, size), CPU)
        seat: Any = Seat(meeting, rank)
        return guards.run_paged(Decoder(part, ReferenceKernels(), Together(seat, width)), own, TEXTS)

    with ThreadPoolExecutor(size) as pool:
        found, *_ = pool.map(one, range(size))
        return found


def whole_logits(folder: Path) -> list[Tensor]:
    whole, layers = described(folder)
    with torch.inference_mode():
        return guards.run_paged(Decoder(whole, ReferenceKernels()), layers, TEXTS)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model_type", TYPES)
def test_ranks_give_the_whole_models_logits(model_type: str, size: int) -> None:
    """With 4 ranks and 2 KV heads, two ranks keep the same one."""
    folder = tiny(model_type)
    found = logits_of_ranks(folder, size)
    assert guards.relative_error(found, whole_logits(folder)) < 1e-5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ranks_give_a_gemma4s_logits(flavour: str) -> None:
    """Shared keys, keys that are values, experts beside the MLP; what layers add of a token's own is each rank's."""
    folder = gemma4(flavour)
    assert guards.relative_error(logits_of_ranks(folder, 2), whole_logits(folder)) < 1e-5


@pytest.mark.parametrize("vocab", [321, 273])
def test_a_vocabulary_that_ranks_do_not_divide(vocab: int) -> None:
    folder = tiny("llama", vocab=vocab)
    found = logits_of_ranks(folder, 4)
    assert found[0].shape[1] == vocab
    assert guards.relative_error(found, whole_logits(folder)) < 1e-5


def test_a_tied_head_is_a_view_of_the_embedding() -> None:
    whole, _layers = described(tiny("llama", tie_word_embeddings=True))
    shard(whole, Share(1, 2), CPU)
    assert isinstance(whole.head.weight, Tensor)
    assert isinstance(whole.embedding, Tensor)
    half = whole.embedding[len(whole.embedding) // 2 :]
    assert whole.head.weight.data_ptr() == half.data_ptr()


def test_a_rank_holds_its_part_and_no_more() -> None:
    whole, layers = described(tiny("qwen2"))
    attention_part, mlp = whole.layers[0].mixer, whole.layers[0].mlp
    assert isinstance(mlp, decoder_spec.MLP)
    before = [x.weight.shape for x in (*attention_part.qkv, attention_part.out, *mlp.gate_up, mlp.down)]
    own = shard(whole, Share(1, 2), CPU)
    after = [x.weight.shape for x in (*attention_part.qkv, attention_part.out, *mlp.gate_up, mlp.down)]
    assert [(a[0] // b[0], a[1] // b[1]) for a, b in zip(before, after, strict=True)] == [
        (2, 1), (2, 1), (2, 1), (1, 2), (2, 1), (2, 1), (1, 2),
    ]  # fmt: skip
    assert own[0].kv_heads * 2 == layers[0].kv_heads
    assert all(part.bias is not None for part in attention_part.qkv)


def test_biases_of_sums_are_the_first_ranks() -> None:
    for rank in (0, 1):
        whole, _layers = described(tiny("starcoder2"))
        shard(whole, Share(rank, 2), CPU)
        mlp = whole.layers[0].mlp
        assert isinstance(mlp, decoder_spec.MLP)
        assert (whole.layers[0].mixer.out.bias is None) == (rank == 1)
        assert (mlp.down.bias is None) == (rank == 1)


@pytest.mark.parametrize(
    ("model_type", "size", "message"),
    [
        ("llama", 3, "doesn't divide its 4 query heads"),
        ("llama", 8, "doesn't divide its 4 query heads"),
        ("olmo2", 2, "spans all heads"),
    ],
)
def test_what_ranks_do_not_divide_is_refused(model_type: str, size: int, message: str) -> None:
    whole, _ = described(tiny(model_type))
    with pytest.raises(LoadError, match=message):
        refuse_uneven(whole, size)


def test_sizes_that_ranks_do_not_divide_are_refused() -> None:
    for overrides, message in (
        (
            {"hidden": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
            "2 doesn't divide its 3 KV heads",
        ),
        ({"intermediate_size": 101}, "2 doesn't divide its 101 hidden values of the MLP"),
    ):
        whole, _ = described(tiny("llama", **overrides))
        with pytest.raises(LoadError, match=message):
            refuse_uneven(whole, 2)


def test_a_probe_without_products_finds_the_same_layers() -> None:
    for model_type in TYPES:
        config = EngineConfig(source=str(tiny(model_type)), dtype="float32", max_context=128)
        module = loader.load(config, lambda *_: None).module
        assert module is not None
        wanted = attention.probe_layers(module)
        assert attention.probe_layers(module, multiply=False) == wanted

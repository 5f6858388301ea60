"""Buckets, static rows and the packed copies, without a GPU: what a captured step reads is what was filled in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenmill.engine.cuda_graph import DecodeGraphs, Recorded, StaticRows, buckets_up_to, record
from tokenmill.engine.kernel_choice import select_kernels
from tokenmill.engine.kernel_set import ReferenceKernels
from tokenmill.engine.staging import ALIGNMENT, LINES, Staging
from tokenmill.kernels import gpu

CPU = torch.device("cpu")
WIDTH = 8


@pytest.mark.parametrize(
    ("rows", "buckets"),
    [
        (1, [1]),
        (3, [3, 2, 1]),
        (8, [8, 4, 2, 1]),
        (16, [16, 8, 4, 2, 1]),
        (30, [30, 24, 16, 8, 4, 2, 1]),
        (32, [32, 24, 16, 8, 4, 2, 1]),
    ],
)
def test_buckets(rows: int, buckets: list[int]) -> None:
    assert buckets_up_to(rows) == buckets


def test_rows_beyond_a_step_are_padding() -> None:
    rows = StaticRows(6, 3, CPU)
    everything = {name: np.arange(1, 7).astype(kind) for name, kind in StaticRows.FIELDS}
    rows.fill(6, everything)
    assert all(rows[name].tolist() == [1, 2, 3, 4, 5, 6] for name, _ in StaticRows.FIELDS)
    rows.fill(4, {"slots": np.array([7, 9]), "rows": np.array([3, 0]), "seq_lens": np.array([5, 6])})
    assert rows["slots"][:4].tolist() == [7, 9, -1, -1]
    assert rows["rows"][:4].tolist() == [3, 0, 6, 6]
    assert rows["seq_lens"][:4].tolist() == [5, 6, 0, 0]
    assert rows["top_p"][:4].tolist() == [1.0] * 4
    assert rows["lines"][:4].tolist() == [-1] * 4
    addresses = [rows[name].data_ptr() for name, _ in StaticRows.FIELDS]
    rows.pad()
    assert [rows[name].data_ptr() for name, _ in StaticRows.FIELDS] == addresses
    assert rows["slots"].tolist() == [-1] * 6


@pytest.mark.parametrize("count", [1, 3, 6, 8])
def test_fields_lie_as_those_of_a_staged_step(count: int) -> None:
    """Both are read by the same kernels, of which Triton makes two where one's pointers aren't aligned."""
    rows = StaticRows(count, 2, CPU)
    first = rows["positions"].data_ptr()
    assert [(field.data_ptr() - first) % ALIGNMENT for field in rows.fields.values()] == [0] * len(
        rows.FIELDS
    )
    assert {len(field) for field in rows.fields.values()} == {count}


def test_the_block_table_is_sent_when_it_changed() -> None:
    rows = StaticRows(4, 3, CPU)
    slots = np.array([2, 0])
    assert rows.needs_table(1, slots)
    assert not rows.needs_table(1, slots)
    assert rows.needs_table(2, slots)
    assert rows.needs_table(2, np.array([0, 2]))
    rows.set_table(torch.tensor([[5, 6], [7, 8]], dtype=torch.int32))
    assert rows.table[:2, :2].tolist() == [[5, 6], [7, 8]]


def test_without_triton_a_gpu_gets_plain_torch_and_a_word_on_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "available", lambda: False)
    kernels = select_kernels(torch.device("cuda"), torch.bfloat16)
    assert type(kernels) is ReferenceKernels
    assert "need Triton: pip install" in caplog.text


class Model:
    """A forward pass whose logits say what it was given: its row's next token is last token + position."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, tokens: Tensor, rows: StaticRows, out: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        wanted = (tokens + rows["positions"][: len(tokens)]) % WIDTH
        return out.zero_().scatter_(1, wanted[:, None], 5.0)


def make(most: int = 4) -> tuple[DecodeGraphs, Model, Tensor]:
    last_tokens = torch.arange(most + 1)
    counts = torch.zeros(most, WIDTH, dtype=torch.int32), torch.zeros(most, WIDTH, dtype=torch.bool)
    model = Model()
    logits = torch.zeros(most, WIDTH)
    graphs = DecodeGraphs(
        ReferenceKernels(), model, StaticRows(most, 2, CPU), logits, last_tokens, counts, record
    )
    return graphs, model, last_tokens


def test_the_largest_bucket_is_captured_first_and_a_step_takes_the_smallest_that_fits() -> None:
    graphs, model, _ = make(10)
    assert graphs.bucket_for(1) == 0
    while graphs.capture_next():
        assert graphs.bucket_for(1) == min(model.calls)
    assert sorted(set(model.calls), reverse=True) == [10, 8, 4, 2, 1]
    assert model.calls == sorted(model.calls, reverse=True)
    assert [graphs.bucket_for(n) for n in (1, 2, 3, 4, 5, 8, 9, 10, 11)] == [1, 2, 4, 4, 8, 8, 10, 10, 0]
    assert graphs.progress == 1
    assert not graphs.capture_next()


def test_a_replay_feeds_on_the_tokens_of_the_last_one_and_padding_touches_nobody() -> None:
    graphs, _, last_tokens = make()
    while graphs.capture_next():
        pass
    assert last_tokens[:4].tolist() == [0, 1, 2, 3], "capturing draws for nobody"
    fields = {"rows": np.array([3, 1, 0]), "slots": np.array([4, 5, 6]), "seq_lens": np.array([2, 2, 2])}
    for position, expected in ((1, [4, 2, 1]), (2, [6, 4, 3])):
        graphs.rows.fill(4, {**fields, "positions": np.full(3, position)})
        graphs.run(4)
        graphs.draw(4, "plain")
        assert graphs.results[0, :3].tolist() == expected
        assert graphs.results[1, :3].tolist() == [0, 0, 0]
    assert last_tokens[:4].tolist() == [3, 4, 2, 6]


def test_the_full_sampler_penalizes_and_counts() -> None:
    graphs, _, _ = make()
    while graphs.capture_next():
        pass
    counts = graphs._counts[0]
    counts[1, 3] = 1
    graphs.rows.fill(
        2,
        {
            "rows": np.array([1, 2]), "lines": np.array([1, -1]), "positions": np.array([2, 2]),
            "presence": np.array([9.0, 9.0]), "seq_lens": np.array([2, 2]),
        },
    )  # fmt: skip
    graphs.run(2)
    graphs.draw(2, "full")
    assert graphs.results[0, :2].tolist() == [0, 4]
    assert counts[1].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert int(counts.sum()) == 2


def test_what_can_not_be_captured_runs_uncaptured() -> None:
    graphs, _, _ = make()
    attempts = []

    def too_large(work: object) -> Recorded:
        attempts.append(work)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("no room")
        raise RuntimeError("not while it rains")

    graphs._capture = too_large
    assert graphs.capture_next(), "a smaller one may fit"
    assert not graphs.capture_next()
    assert graphs.bucket_for(1) == 0


def test_one_copy_carries_arrays_of_all_types() -> None:
    staging = Staging(CPU, packed=True)
    generator = np.random.default_rng(0)
    for _ in range(3 * LINES):
        arrays = [
            generator.integers(0, 100, 3), generator.random((2, 5), np.float32), np.zeros(0, np.int64),
            generator.integers(0, 9, (4, 3)).astype(np.int32)[:, :2], np.array([True, False]),
        ]  # fmt: skip
        for array, tensor in zip(arrays, staging.put(arrays), strict=True):
            assert tensor.shape == array.shape
            assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(array)))
    assert [len(tensor) for tensor in staging.put([np.zeros(0), np.zeros(0)])] == [0, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_results_come_back_as_they_were_when_the_copy_began(packed: bool) -> None:
    staging = Staging(CPU, packed=packed)
    tokens, flags = torch.tensor([5, 6, 7]), torch.tensor([True, False, True])
    scores = torch.rand(2, 3)
    fetched = staging.fetch([tokens, flags, scores])
    alone = staging.fetch([tokens])
    expected = scores.clone()
    tokens.zero_(), scores.zero_()
    found = fetched.wait()
    assert [array.tolist() for array in found[:2]] == [[5, 6, 7], [True, False, True]]
    assert np.array_equal(found[2], expected.numpy())
    assert alone.wait()[0].tolist() == [5, 6, 7]

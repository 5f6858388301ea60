"""What the stand-in for a GPU notices, and the staging and capturing code that has to pass it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_gpu import GPU, Fault, StandInGpu, on_gpu, stand_in_gpu

from tokenmill.engine import staging
from tokenmill.engine.cuda_graph import CudaCapture
from tokenmill.engine.staging import Fetched, PinnedLines, Staging
from tokenmill.kernels import gpu as kernels


@pytest.fixture
def gpu() -> Iterator[StandInGpu]:
    with stand_in_gpu() as device:
        yield device


def test_tensors_know_where_they_are_and_do_not_mix(gpu: StandInGpu) -> None:
    there, here = torch.zeros(3, device=GPU), torch.ones(3)
    assert (there + 1)[1:].device == there.view(3, 1).device == GPU
    assert there.is_cuda
    assert not here.is_cuda
    assert (there + torch.tensor(2.0)).tolist() == [2.0] * 3
    with pytest.raises(Fault, match="of the host's among the device's"):
        there + here
    assert not gpu.waits["a tensor moved between host and device"]
    moved = here.to(GPU)
    assert on_gpu(moved)
    assert not on_gpu(moved.cpu())
    assert gpu.waits["a tensor moved between host and device"] == 2
    moved[0] = 5
    assert here.tolist() == [1.0] * 3


def test_kernels_take_what_is_on_the_device(gpu: StandInGpu) -> None:
    x, weight = torch.ones(2, 32, device=GPU), torch.ones(32, device=GPU)
    assert on_gpu(kernels.rms_norm(x, weight, 1e-5, 0.0))
    with pytest.raises(Fault, match="lies in the host's memory"):
        kernels.rms_norm(x, torch.ones(32), 1e-5, 0.0)


def test_variants_are_what_triton_compiles_anew_for(gpu: StandInGpu) -> None:
    weight = torch.ones(32, device=GPU)
    for rows in (2, 7):
        kernels.rms_norm(torch.ones(rows, 32, device=GPU), weight, 1e-5, 0.0)
    assert list(gpu.variants.values()) == ["_rms_norm_kernel"]
    kernels.rms_norm(torch.ones(65, device=GPU)[1:].view(2, 32), weight, 1e-5, 0.0)
    assert list(gpu.variants.values()) == ["_rms_norm_kernel"] * 2


def test_staged_arrays_wait_for_nobody(gpu: StandInGpu) -> None:
    stage = Staging(GPU)
    for step in range(9):
        put = stage.put([np.full(3, step), np.ones(5, np.float32)])
        assert all(on_gpu(tensor) for tensor in put)
        fetched = stage.fetch(put)
        assert not gpu.waits
        assert fetched.wait()[0].tolist() == [step] * 3
    assert gpu.late == gpu.checked == 9


def test_a_buffer_written_before_its_copy_has_run_is_a_fault(
    gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one buffer in turn, so that each is needed again at once."""
    monkeypatch.setattr(staging, "LINES", 1)

    def two_copies(lines: PinnedLines, *, forgetful: bool) -> None:
        for value in (1, 2):
            if forgetful:
                lines._events[0] = None
            lines.take(4).fill_(value)
            lines.send(torch.empty(4, dtype=torch.uint8, device=GPU))
        gpu.wait("synchronize")

    two_copies(PinnedLines(GPU, 4), forgetful=False)
    assert gpu.checked == 2
    with pytest.raises(Fault, match="written before its copy"):
        two_copies(PinnedLines(GPU, 4), forgetful=True)


def test_an_unpinned_buffer_makes_the_host_wait(gpu: StandInGpu) -> None:
    lines = PinnedLines(GPU, 4)
    lines._buffers = [torch.empty(4, dtype=torch.uint8) for _ in lines._buffers]
    lines.take(4).fill_(1)
    lines.send(torch.empty(4, dtype=torch.uint8, device=GPU))
    assert gpu.waits["a copy that isn't of pinned memory or isn't asked not to block"] == 1


def test_results_read_before_their_event_are_garbage(gpu: StandInGpu) -> None:
    fetched = Staging(GPU).fetch([torch.arange(3, device=GPU)])
    early = Fetched(fetched.tensors)
    assert early.wait()[0].tolist() != [0, 1, 2]
    assert fetched.wait()[0].tolist() == [0, 1, 2]


def captured(work: Any) -> Any:
    return CudaCapture(GPU)(work)


def test_a_graph_does_its_work_again_at_the_same_addresses(gpu: StandInGpu) -> None:
    source, target = torch.arange(3, device=GPU), torch.zeros(3, dtype=torch.int64, device=GPU)
    inside: list[torch.Tensor] = []

    def work() -> None:
        inside[:] = [source * 2]
        target.copy_(inside[0] + 1)

    graph = captured(work)
    other = captured(lambda: source + 1)
    source.add_(10)
    graph.replay()
    assert target.tolist() == [21, 23, 25]
    assert inside[0].tolist() == [20, 22, 24]
    other.replay()
    assert inside[0].tolist() != [20, 22, 24], "memory of the pool is another graph's now"
    graph.replay()
    assert inside[0].tolist() == [20, 22, 24]


def test_a_launch_is_replayed(gpu: StandInGpu) -> None:
    x, weight = torch.ones(2, 32, device=GPU), torch.ones(32, device=GPU)
    out = torch.zeros(2, 32, device=GPU)
    graph = captured(lambda: out.copy_(kernels.rms_norm(x, weight, 0.0, 0.0)))
    weight.fill_(3.0)
    graph.replay()
    assert out.tolist() == [[3.0] * 32] * 2


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 1],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1, 2], device=GPU),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.nonzero(x),
    ],
    ids=["item", "mask", "host copy", "host numbers", "synchronize", "nonzero"],
)
def test_what_waits_can_not_be_captured(gpu: StandInGpu, work: Any) -> None:
    x = torch.arange(3, device=GPU)
    with pytest.raises(Fault, match="not while a graph is captured"):
        captured(lambda: work(x))
    assert captured(lambda: x + 1) is not None, "the next capture is not hurt"


def test_the_default_stream_can_not_be_captured(gpu: StandInGpu) -> None:
    with pytest.raises(Fault, match="isn't the default"):
        torch.cuda.CUDAGraph().capture_begin()

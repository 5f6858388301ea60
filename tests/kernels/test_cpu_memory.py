"""Memory for kernels: aligned, zero, its pages there on demand and only then."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from tokenmill.kernels.cpu import memory

MIB = 2**20


def test_pieces_are_aligned_zero_and_apart() -> None:
    arena = memory.Arena()
    pieces = [arena.take(size) for size in (1, 63, 64, 65, 3 * MIB, 5, 20 * MIB, 7 * MIB, 0)]
    for number, piece in enumerate(pieces, 1):
        assert piece.data_ptr() % memory.LINE == 0 or piece.numel() == 0
        assert not piece.any()
        piece.fill_(number)
    for number, piece in enumerate(pieces, 1):
        assert (piece == number).all()


def test_a_chunk_outlives_its_arena() -> None:
    piece = memory.Arena().take(100).fill_(7)
    assert piece.tolist() == [7] * 100


@pytest.mark.skipif(sys.platform != "linux", reason="madvise's populate is Linux's")
def test_touched_memory_keeps_its_content_and_faults_no_more() -> None:
    pages = memory.zeros(8 * MIB)
    pages[5] = 3
    if not memory.touch(pages, 0, 16 * MIB):  # as much as there is
        pytest.skip("this kernel is older than madvise's populate (Linux 5.14)")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pages[1:] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 8 * MIB // resource.getpagesize() // 4, "those of torch's own threads, at the most"
    assert pages[0] == 0
    assert torch.equal(memory.zeros(0), torch.zeros(0, dtype=torch.uint8))

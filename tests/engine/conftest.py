"""Surroundings that some of the engine's tests ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmill.engine import LLM
from tokenmill.kernels.cpu import library


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that nothing is in yet; the CPU's kernels, once built, stay where they are."""
    library.current()
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines get the Triton kernels, in their interpreter."""
    monkeypatch.setenv("TOKENMILL_KERNELS", "triton")


@pytest.fixture
def plain() -> LLM:
    """The engine on the CPU's own kernels that those on Triton are held against."""
    from gpu_models import on_cpu

    return on_cpu()

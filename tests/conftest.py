"""What every test shares: no network, a cache folder of the repository's own, nothing left to chance or a clock."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on any machine, if slowly
os.environ.setdefault("TOKENMILL_CACHE", str(Path(__file__).parents[1] / "build" / "test-cache"))

# The same examples in every run: `--hypothesis-profile=search` looks for others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whatever a test draws without a generator of its own, it draws the same each time."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

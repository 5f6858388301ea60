"""What every test shares: no network, a cache folder of the repository's own, properties without a clock."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on any machine, if slowly
os.environ.setdefault("TOKENMILL_CACHE", str(Path(__file__).parents[1] / "build" / "test-cache"))

settings.register_profile("tokenmill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tokenmill")

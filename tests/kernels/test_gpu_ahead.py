"""What is compiled ahead by other processes is what launches then find in Triton's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(cache: Path, *arguments: str) -> dict[str, Any]:
    program = Path(__file__).with_name("gpu_ahead.py")
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["stderr"] = done.stderr
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def found(cache: Path) -> dict[str, Any]:
    return run(cache)


def test_processes_compile_what_the_cache_has_not(found: dict[str, Any]) -> None:
    assert found["cold"] >= 3
    assert found["files"] == found["cold"] + 1, "the first miss is compiled here, the rest by processes"
    assert found["warm"] == 0


def test_the_launches_of_another_process_find_it(found: dict[str, Any], cache: Path) -> None:
    assert run(cache, "again")["compiled"] == []


def test_a_rehearsal_that_goes_wrong_costs_nothing_but_itself(found: dict[str, Any]) -> None:
    assert found["broken"] == 0
    assert "a rehearsal that goes wrong" in found["stderr"]


def test_other_threads_launch_as_ever(found: dict[str, Any]) -> None:
    assert found["launched_elsewhere"]


def test_a_kernels_key_depends_on_no_order(found: dict[str, Any]) -> None:
    """What a kernel calls stands above it, so that its key can be made at once (`jit`)."""
    assert found["unsettled_keys"] == []

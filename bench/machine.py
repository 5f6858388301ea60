"""What a result was measured on: enough to compare two results, nothing that tells whose machine it was."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("tokenmill", "torch", "transformers", "tokenizers", "triton", "numpy")
INSTRUCTION_SETS = (
    "amx_bf16",
    "amx_int8",
    "avx512_bf16",
    "avx512_vnni",
    "avx512f",
    "avx2",
    "fma",
    "bf16",
    "asimd",
)


def describe_machine() -> dict[str, object]:
    """Processor, memory, system, and how busy the machine was when the measurement began."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags", "Features").split())
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": _load(),
    }


def describe_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of the installed ones among `packages`, and the commit of a checkout."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return versions | ({"commit": commit} if commit else {})


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str:
    """The short commit with `-dirty` where files differ; empty outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _memory_gib() -> float:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0.0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    """The first value behind any of `names` in `name : value` lines."""
    found = re.search(rf"^(?:{'|'.join(names)})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""

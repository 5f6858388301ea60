"""Compiles `src/*.cpp` into one shared library per instruction set, once per machine and version.

The library's name holds a hash of everything that shapes it (sources, compiler, options), so a file that
exists is right. It is written under another name and renamed: processes may race, and each gets a whole file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tokenmill.kernels.cpu.isa import InstructionSet

SOURCES = Path(__file__).parent / "src"
OPTIONS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-exceptions"),
    # Products round unless the source says `fma`: the same bits from every template and loop.
    "-ffp-contract=off",
)
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The library can't be made here; the message is one line."""


def cache_folder() -> Path:
    """Where built files are kept: $TOKENMILL_CACHE, else tokenmill/ in the user's cache folder."""
    if own := os.environ.get("TOKENMILL_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "tokenmill"


def find_compiler() -> str:
    """The path of $CXX, or of the first C++ compiler on PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler on PATH")


def build(isa: InstructionSet) -> Path:
    """The library for `isa`, compiled if no earlier process did; raises BuildError."""
    compiler = find_compiler()
    target = cache_folder() / "kernels" / f"cpu-{isa.name}-{_fingerprint(compiler, isa)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(compiler, isa, Path(folder))
            os.replace(Path(folder) / "library.so", target)
    except OSError as error:
        raise BuildError(f"cannot write {target.parent}: {error.strerror}") from error
    return target


def _fingerprint(compiler: str, isa: InstructionSet) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    real = Path(compiler).resolve()
    state = real.stat()
    digest.update(repr((str(real), state.st_size, state.st_mtime_ns, OPTIONS, isa.options)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: str, isa: InstructionSet, folder: Path) -> None:
    """Each source on its own core, then the link."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    common = [compiler, *OPTIONS, *isa.options]
    jobs = [
        subprocess.Popen(
            [*common, "-c", str(source), "-o", str(made)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, made in zip(sources, objects, strict=True)
    ]
    failures = []
    for source, job in zip(sources, jobs, strict=True):
        try:
            _, complaint = job.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            job.kill()
            _, complaint = job.communicate()
        if job.returncode != 0:
            failures.append(f"{source.name}: {_first_error(complaint)}")
    if failures:
        raise BuildError(failures[0])
    link = [*common, "-shared", *map(str, objects), "-o", str(folder / "library.so")]
    done = subprocess.run(link, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise BuildError(f"linking: {_first_error(done.stderr)}")


def _first_error(complaint: str) -> str:
    lines = complaint.splitlines() or ["the compiler failed without a word"]
    return next((line for line in lines if "error" in line), lines[0])[:300]

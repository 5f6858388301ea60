"""Compiles `src/*.cpp` into one shared library per instruction set, once per machine and version.

The library's name holds a hash of everything that shapes it (sources, compiler, options), so a file that
exists is right. It is written under another name and renamed, so that each process gets a whole file; who comes while
another one builds waits for it.
Where the cache folder can't be written, a process builds for itself, in a temporary folder: that costs each
start the seconds of a compiler, plain torch would cost every token.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenmill.kernels.cpu.isa import InstructionSet

SOURCES = Path(__file__).parent / "src"
OPTIONS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-exceptions"),
    # Products round unless the source says `fma`: the same bits from every template and loop.
    "-ffp-contract=off",
)
UNITS = (
    ("linear",),
    ("linear_quantized",),
    ("elementwise", "recurrent", "sampling"),
    ("attention",),
    ("logits", "mixture", "pack", "probe", "quantize", "tape", "threads"),
)
"""Sources that the compiler takes together, the longest first: reading the headers costs it half a second a unit."""
TIMEOUT_S = 600
ROOM = 32 << 20
"""Free bytes that a build asks for, its objects included: a full disk is seen before the compiler runs."""


class BuildError(RuntimeError):
    """The library can't be made here; the message is one line."""


class UnwritableError(BuildError):
    """Nor could it be for another instruction set: the folder takes no files."""


def cache_folder() -> Path:
    """Where built files are kept: $TOKENMILL_CACHE, else tokenmill/ in the user's cache folder."""
    if own := os.environ.get("TOKENMILL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "tokenmill"


def find_compiler() -> str:
    """The path of $CXX, or of the first C++ compiler on PATH."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler on PATH")


def build(isa: InstructionSet, folder: Path | None = None) -> Path:
    """The library for `isa` in `folder` (the user's cache), compiled if no earlier process did.

    Raises BuildError, and UnwritableError where the folder is the reason.
    """
    compiler = find_compiler()
    folder = folder or cache_folder() / "kernels"
    target = folder / f"cpu-{isa.name}-{_fingerprint(compiler, isa)}.so"
    try:
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if target.exists():
                return target
            if shutil.disk_usage(folder).free < ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                _compile(compiler, isa, Path(beside))
                os.replace(Path(beside) / "library.so", target)
    except OSError as error:
        raise UnwritableError(f"cannot write {folder}: {error.strerror}") from error
    return target


def stop() -> None:
    """End the compiler where it runs for this process: who waits for it gets a BuildError."""
    for job in tuple(_jobs):
        job.kill()


@contextmanager
def built(isa: InstructionSet) -> Iterator[tuple[Path, str | None]]:
    """The library for `isa`, to be loaded inside the block, and why the cache doesn't keep it (None: it does).

    A library that isn't kept is deleted with the block; once loaded, it needs its file no more. Raises
    BuildError.
    """
    try:
        kept = build(isa)
    except UnwritableError as error:
        reason = str(error)
    else:
        yield kept, None
        return
    try:
        passing = tempfile.TemporaryDirectory(prefix="tokenmill-")
    except OSError:
        raise UnwritableError(f"{reason}, and there is no temporary folder") from None
    with passing as folder:
        yield build(isa, Path(folder)), reason


_one_thread = threading.Lock()
_jobs: list[subprocess.Popen[str]] = []
"""Of the build that this process is at."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other thread or process build into `folder` meanwhile, but those on file systems without locks."""
    with _one_thread:
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _fingerprint(compiler: str, isa: InstructionSet) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    real = Path(compiler).resolve()
    state = real.stat()
    digest.update(repr((str(real), state.st_size, state.st_mtime_ns, OPTIONS, UNITS, isa.options)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: str, isa: InstructionSet, folder: Path) -> None:
    """Each unit on its own core, then the link."""
    common = [compiler, *OPTIONS, *isa.options]
    objects = [str(folder / f"{unit[0]}.o") for unit in UNITS]
    _run([[*common, *_inputs(unit), "-o", made] for unit, made in zip(UNITS, objects, strict=True)])
    _run([[*common, "-shared", *objects, "-o", str(folder / "library.so")]])


def _inputs(unit: tuple[str, ...]) -> list[str]:
    """Nothing, with the unit's sources before it."""
    included = [part for name in unit for part in ("-include", str(SOURCES / f"{name}.cpp"))]
    return [*included, "-x", "c++", "-c", os.devnull]


def _run(commands: list[list[str]]) -> None:
    """All of them side by side; raises BuildError with the first complaint."""
    try:
        for command in commands:
            _jobs.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        failures = [complaint for job in _jobs if (complaint := _complaint(job)) is not None]
    finally:
        stop()
        _jobs.clear()
    if failures:
        raise BuildError(failures[0])


def _complaint(job: subprocess.Popen[str]) -> str | None:
    """Wait for the compiler; what it has to say where it failed."""
    try:
        _, complaint = job.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        _, complaint = job.communicate()
    return _first_error(complaint) if job.returncode != 0 else None


def _first_error(complaint: str) -> str:
    lines = complaint.splitlines() or ["the compiler failed without a word"]
    return next((line for line in lines if "error" in line), lines[0])[:300]

"""Compiles `src/*.cpp` into one shared library per instruction set, once per machine and version.

The library's name holds a hash of everything that shapes it (sources, compiler, options), so a file that
exists is right. It is written under another name and renamed: processes may race, and each gets a whole file.
Where the cache folder can't be written, a process builds for itself, in a temporary folder: that costs each
start the seconds of a compiler, plain torch would cost every token.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmill.kernels.cpu.isa import InstructionSet

SOURCES = Path(__file__).parent / "src"
OPTIONS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-exceptions"),
    # Products round unless the source says `fma`: the same bits from every template and loop.
    "-ffp-contract=off",
)
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
        if shutil.disk_usage(folder).free < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            _compile(compiler, isa, Path(beside))
            os.replace(Path(beside) / "library.so", target)
    except OSError as error:
        raise UnwritableError(f"cannot write {folder}: {error.strerror}") from error
    return target


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

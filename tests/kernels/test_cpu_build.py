"""Building and choosing the CPU library: cached, safe against races, and never fatal."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE_S, eventually

from tokenmill.kernels.cpu import ahead, build, isa, library

# A library that nobody times is compiled in a third of the time without optimisation.
QUICK = isa.InstructionSet("quick", frozenset(), ("-O0",))
BUILD = """
from tokenmill.kernels.cpu import build, isa
print(build.build(isa.InstructionSet("quick", frozenset(), ("-O0",))))
"""
NO_COMPILER = """
import os, torch
os.environ["PATH"] = ""
os.environ.pop("CXX", None)
from tokenmill.kernels.cpu import library
print(library.current(), library.current())
"""


def in_process(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_race_all_get_the_one_library(tmp_path: Path) -> None:
    """The compiler tells what it links: once, since who comes second waits for who came first."""
    compiler, links = tmp_path / "compiler", tmp_path / "links"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo link >> {links};; esac\nexec {build.find_compiler()} "$@"\n'
    )
    compiler.chmod(0o755)
    racers = [in_process(BUILD, TOKENMILL_CACHE=str(tmp_path), CXX=str(compiler)) for _ in range(2)]
    answers = [racer.communicate(timeout=800) for racer in racers]
    assert links.read_text() == "link\n"
    (made,) = (tmp_path / "kernels").iterdir()
    assert [output.strip() for output, _ in answers] == [str(made)] * 2, answers
    assert ctypes.CDLL(str(made)).tm_probe() == 0


def test_threads_that_race_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []

    def compile_slowly(_: str, __: isa.InstructionSet, folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.2)
        (folder / "library.so").write_bytes(b"")

    monkeypatch.setattr(build, "_compile", compile_slowly)
    with ThreadPoolExecutor(3) as pool:
        made = set(pool.map(lambda _: build.build(QUICK, tmp_path), range(3)))
    assert len(builds) == len(made) == 1


def test_a_folder_without_locks_is_built_into_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(build, "_compile", lambda _, __, folder: (folder / "library.so").write_bytes(b""))
    assert build.build(QUICK, tmp_path).exists()


def test_every_source_is_compiled_once() -> None:
    named = [name for unit in build.UNITS for name in unit]
    assert sorted(named) == sorted(path.stem for path in build.SOURCES.glob("*.cpp"))


def test_the_library_is_built_ahead_of_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def compile_when_told(_: str, __: isa.InstructionSet, folder: Path) -> None:
        began.set()
        assert go_on.wait(PATIENCE_S)
        (folder / "library.so").write_bytes(b"")

    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.delenv("TOKENMILL_ISA", raising=False)
    monkeypatch.setattr(ahead, "supported", lambda: (QUICK,))
    monkeypatch.setattr(build, "_compile", compile_when_told)
    ahead.Ahead()
    assert began.wait(PATIENCE_S)
    monkeypatch.setattr(build, "_compile", None)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(build.build, QUICK)
        go_on.set()
        assert asked.result(PATIENCE_S).exists()


def test_what_nobody_will_need_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 3600\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    under_way = ahead.Ahead()
    eventually(lambda: len(build._jobs) == len(build.UNITS))
    jobs = tuple(build._jobs)
    under_way.stop()
    assert all(job.poll() == -signal.SIGKILL for job in jobs)
    eventually(lambda: not list((tmp_path / "cache" / "kernels").iterdir()))


def test_no_compiler_is_one_line_and_plain_torch(tmp_path: Path) -> None:
    output, complaint = in_process(NO_COMPILER, TOKENMILL_CACHE=str(tmp_path)).communicate(timeout=800)
    assert output.strip() == "None None"
    assert complaint.count("\n") == 1
    assert "no C++ compiler" in complaint


def test_a_failed_build_names_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    unknown = isa.InstructionSet("unknown", frozenset(), ("-mno-such-option",))
    with pytest.raises(build.BuildError, match="no-such-option") as error:
        build.build(unknown)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_build_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TOKENMILL_CACHE", str(blocked))
    with pytest.raises(build.BuildError, match="cannot write"):
        build.build(isa.supported()[-1])


def test_a_process_builds_for_itself_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked, passing = tmp_path / "file", tmp_path / "tmp"
    blocked.write_text("")
    passing.mkdir()
    monkeypatch.setenv("TOKENMILL_CACHE", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(passing))
    monkeypatch.setattr(library, "supported", lambda: (QUICK,))
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_current", None)
    monkeypatch.setattr(library, "_tried", False)
    with caplog.at_level(logging.WARNING):
        chosen = library.current()
    assert chosen is not None
    assert chosen.tm_probe() == 0
    assert list(passing.iterdir()) == []
    (record,) = caplog.records
    assert "set TOKENMILL_CACHE" in record.getMessage()


def test_a_full_disk_is_seen_before_the_compiler_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "ROOM", 1 << 60)
    monkeypatch.setattr(build, "_compile", None)
    with pytest.raises(build.UnwritableError, match="No space left"), build.built(isa.supported()[-1]):
        pass


def test_the_name_follows_sources_compiler_and_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = build.find_compiler()
    plain, other = isa.supported()[-1], isa.InstructionSet("other", frozenset(), ("-g",))
    names = {build._fingerprint(compiler, plain), build._fingerprint(compiler, other)}
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "linear.cpp").write_text("int main() {}")
    monkeypatch.setattr(build, "SOURCES", sources)
    names.add(build._fingerprint(compiler, plain))
    assert len(names) == 3


def test_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/a")
    monkeypatch.setenv("TOKENMILL_CACHE", "~/a")
    assert build.cache_folder() == Path.home() / "a"
    monkeypatch.delenv("TOKENMILL_CACHE")
    assert build.cache_folder() == Path("/b/tokenmill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "tokenmill"


def test_the_next_best_set_serves_when_the_best_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = isa.InstructionSet("broken", frozenset(), ("-mno-such-option",))
    plain = isa.supported()[-1]
    monkeypatch.setattr(library, "supported", lambda: (broken, plain))
    monkeypatch.setattr(library, "_current", None)
    monkeypatch.setattr(library, "_tried", False)
    with caplog.at_level(logging.WARNING):
        chosen = library.current()
    assert chosen is not None
    assert chosen.isa == plain.name
    assert len(caplog.records) == 1


def test_the_environment_may_name_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_current", None)
    monkeypatch.setattr(library, "_tried", False)
    monkeypatch.setenv("TOKENMILL_ISA", "abacus")
    for _ in range(2):  # the second call is refused like the first
        with pytest.raises(ValueError, match="TOKENMILL_ISA must be a set that this machine has"):
            library.current()
    plain = isa.supported()[-1]
    monkeypatch.setenv("TOKENMILL_ISA", plain.name)
    chosen = library.current()
    assert chosen is not None
    assert chosen.isa == plain.name


def test_a_forked_child_computes_on_its_own() -> None:
    code = """
import os, torch
from tokenmill.kernels.cpu import library
from tokenmill.kernels.cpu.linear import PackedLinear
library.required(); library.set_threads(3)
linear, x = PackedLinear(torch.ones(400, 64)), torch.ones(4, 64)
before = linear(x)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(linear(x), before) for _ in range(20)) else 1)
print(os.waitpid(child, 0)[1], torch.equal(linear(x), before))
"""
    output, complaint = in_process(code).communicate(timeout=800)
    assert output.strip() == "0 True", complaint


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        library.set_threads(0)


def test_types_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="float16"):
        library.type_of(torch.zeros(1, dtype=torch.float16))

"""A process that will need the CPU's kernels has them compiled while it imports what it needs before."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tokenmill.engine import host
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.host import Host, wants_cpu_kernels
from tokenmill.engine.messages import Start


@pytest.mark.parametrize(
    ("device", "gpu", "kernels", "wanted"),
    [
        ("cpu", False, None, True),
        ("cpu", True, None, True),
        ("auto", False, None, True),
        ("auto", False, "cpu", True),
        ("auto", True, None, False),
        ("cuda", True, None, False),
        ("cuda:1", False, None, False),
        ("cpu", False, "torch", False),
    ],
)
def test_who_will_need_them(
    device: str,
    gpu: bool,
    kernels: str | None,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(host, "NVIDIA", tmp_path if gpu else tmp_path / "none")
    if kernels is None:
        monkeypatch.delenv("TOKENMILL_KERNELS", raising=False)
    else:
        monkeypatch.setenv("TOKENMILL_KERNELS", kernels)
    assert wants_cpu_kernels(EngineConfig(source="x", device=device)) is wanted


def test_they_are_begun_before_loading_and_given_up_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Ahead:
        def __init__(self) -> None:
            events.append("begun")

        def stop(self) -> None:
            events.append("given up")

    monkeypatch.setattr(host, "Ahead", Ahead)
    monkeypatch.setattr(Host, "_load", lambda *_: events.append("not loaded"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        failing = Host(theirs)
        monkeypatch.setattr(failing._link, "start", lambda: None)
        monkeypatch.setattr(failing._link, "flush", lambda: None)
        failing._link.inbox.put(Start(EngineConfig(source="x", device="cpu")))
        assert failing.run() == 0
    assert events == ["begun", "not loaded", "given up"]

"""A process that loads says that it lives, whatever keeps its main thread."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from tokenmill.engine import host, link, speech_host
from tokenmill.engine.config import EngineConfig, SpeechConfig
from tokenmill.engine.link import Outbox, pulse
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.messages import Alive, LoadFailed, Start, StartSpeech


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "BEAT_S", 0.001)


def test_the_pulse_beats_and_ends() -> None:
    outbox = Outbox()
    with pulse(outbox):
        for _ in range(3):
            assert all(isinstance(message, Alive) for message in outbox.take())
    assert "pulse" not in {thread.name for thread in threading.enumerate()}


def test_the_pulse_ends_with_an_error() -> None:
    with pytest.raises(KeyError), pulse(Outbox()):
        raise KeyError
    assert "pulse" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("module", "kind", "loader", "start"),
    [
        (host, host.Host, "tokenmill.engine.engine.Engine", Start(EngineConfig(source="x"))),
        (
            speech_host,
            speech_host.SpeechHost,
            "tokenmill.engine.speech.load_speech",
            StartSpeech(SpeechConfig(source="x")),
        ),
    ],
    ids=["engine", "speech"],
)
def test_a_process_beats_while_it_loads(
    module: Any, kind: Any, loader: str, start: Start | StartSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    ours, theirs = socket.socketpair()

    def load(*_: object, **__: object) -> None:
        while len(heard) < 3:
            heard.extend(loads._outbox.take())
        raise LoadError("that will do")

    monkeypatch.setattr(module, "import_transformers", lambda: None)
    monkeypatch.setattr(loader, load)
    with ours, theirs:
        loads = kind(theirs)
        # Nothing is written or read by threads: the test looks into the outbox itself.
        monkeypatch.setattr(loads._link, "start", lambda: None)
        monkeypatch.setattr(loads._link, "flush", lambda: None)
        loads._link.inbox.put(start)
        assert loads.run() == 0
    assert {type(message) for message in heard} == {Alive}
    assert LoadFailed("that will do") in loads._outbox.take()

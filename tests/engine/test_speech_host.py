"""The speech process over its socket: loads, speaks, tells that it lives, ends with the socket."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from tokenmill.engine import speech_host
from tokenmill.engine.config import SpeechConfig
from tokenmill.engine.messages import (
    HEADER,
    Alive,
    FromSpeech,
    Hush,
    LoadFailed,
    Say,
    SpeechReady,
    Spoken,
    StartSpeech,
    ToSpeech,
    encode_frame,
    from_speech_decoder,
)
from tokenmill.engine.speech_host import SpeechHost
from tokenmill.engine.tiny_speech import make_tiny_vits


class Process:
    """A speech process and this end of its socket."""

    def __init__(self, source: str) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tokenmill.engine.speech_host", "--fd", str(theirs.fileno())]
            self.child = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self.connection.settimeout(240)
        self._stream = self.connection.makefile("rb")
        self.send(StartSpeech(SpeechConfig(source=source, device="cpu", threads=1)))

    def send(self, *messages: ToSpeech) -> None:
        self.connection.sendall(b"".join(map(encode_frame, messages)))

    def receive(self) -> FromSpeech:
        (length,) = HEADER.unpack(self._stream.read(HEADER.size))
        return from_speech_decoder.decode(self._stream.read(length))

    def next(self, kind: type[FromSpeech]) -> FromSpeech:
        """The next message of this kind."""
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def close(self) -> int:
        """Close the socket; the process' exit code."""
        self._stream.close()
        self.connection.close()
        return self.child.wait(timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(str(make_tiny_vits(tmp_path_factory.mktemp("voice") / "vits", speakers=2)))
    ready = running.next(SpeechReady)
    assert isinstance(ready, SpeechReady)
    assert (ready.voices, ready.formats[:2]) == (["0", "1"], ["wav", "pcm16"])
    yield running
    assert running.close() == 0


def clip(process: Process, number: int) -> bytes:
    data = b""
    while True:
        spoken = process.next(Spoken)
        assert isinstance(spoken, Spoken)
        assert (spoken.clip, spoken.error) == (number, None)
        data += spoken.data
        if spoken.last:
            return data


def test_it_speaks(process: Process) -> None:
    process.send(Say(1, "The mill stands by the river.", True, "1", "wav", "7"))
    assert clip(process, 1).startswith(b"RIFF")
    process.send(Say(2, "The mill ", False, "1", "pcm16", "7"), Say(2, "turns.", True))
    assert len(clip(process, 2)) % 2 == 0


def test_a_clip_that_is_called_off_says_nothing(process: Process) -> None:
    process.send(Say(3, "A beginning", False), Hush(3), Say(4, "Another one.", True))
    assert clip(process, 4).startswith(b"RIFF")


def test_it_tells_that_it_lives_while_it_idles(process: Process) -> None:
    assert isinstance(process.receive(), Alive)
    assert isinstance(process.receive(), Alive)


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    process = Process(str(tmp_path))
    failed = process.next(LoadFailed)
    assert isinstance(failed, LoadFailed)
    assert (
        failed.reason
        == f"{tmp_path}: there is no config.json: a checkpoint's folder needs it beside its weights"
    )
    assert process.close() == 0


def test_each_module_that_is_called_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An utterance may take longer than the front end waits for a process that hangs."""
    monkeypatch.setattr(speech_host, "BEAT_S", 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        host = SpeechHost(theirs)
        clips = host._load(StartSpeech(SpeechConfig(source=str(make_tiny_vits(tmp_path)), device="cpu")))
        assert clips is not None
        assert host._hook is not None
        try:
            clips.say(Say(1, "The mill stands by the river.", True))
            host._outbox.take()
            host._outbox.put(Alive())
            spoken = clips.step()
            assert spoken is not None
            assert spoken.last
            assert sum(isinstance(message, Alive) for message in host._outbox.take()) > 20
        finally:
            host._hook.remove()
            gc.unfreeze()

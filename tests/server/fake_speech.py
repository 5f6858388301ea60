"""A scripted speech process: what it "says" are the bytes of the text. No torch, no samples.

Run as `python fake_speech.py --fd N`. pcm16 comes piece by piece, the other formats at the end, behind their name
and a colon; voice and seed, where the request says one, come before all. The source in `Start` may tell it to fail:
`fake:load_failed`, or to be able to write wav and pcm16 only: `fake:bare`. A text that contains a trigger word makes
it misbehave: CRASH, FAIL, STALL (no more of this clip), FLOOD (ten megabytes of it). HUSHED says how many clips were
called off so far.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from typing import BinaryIO

import msgspec

from tokenmill.engine.messages import (
    HEADER,
    Alive,
    AudioFormat,
    Hush,
    LoadFailed,
    Say,
    SpeechReady,
    Spoken,
    StartSpeech,
    encode_frame,
    to_speech_decoder,
)

ALL: list[AudioFormat] = ["wav", "pcm16", "flac", "mp3", "opus"]


class FakeSpeech:
    """Answers each message as it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.first: dict[int, Say] = {}
        self.texts: dict[int, str] = {}
        self.hushed = 0
        self.lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        try:
            with self.lock:
                self.connection.sendall(encode_frame(message))
        except OSError:
            os._exit(0)

    def beat(self) -> None:
        while True:
            self.send(Alive())
            time.sleep(0.5)

    def run(self) -> None:
        stream = self.connection.makefile("rb")
        start = self.receive(stream)
        assert isinstance(start, StartSpeech)
        kind = start.config.source.partition(":")[2]
        if kind == "load_failed":
            self.send(LoadFailed("model.safetensors: truncated; download it again"))
            return
        voices = [*start.config.voices, "0", "1"]
        self.send(
            SpeechReady(
                voices=voices,
                formats=ALL[:2] if kind == "bare" else ALL,
                sample_rate=16000,
                description="a toy that spells",
            )
        )
        threading.Thread(target=self.beat, daemon=True).start()
        while True:
            message = self.receive(stream)
            if isinstance(message, Say):
                self.say(message)
            elif isinstance(message, Hush):
                self.hushed += 1

    def receive(self, stream: BinaryIO) -> object:
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            os._exit(0)
        return to_speech_decoder.decode(stream.read(HEADER.unpack(header)[0]))

    def say(self, message: Say) -> None:
        clip = message.clip
        first = self.first.setdefault(clip, message)
        voice = "".join(f"<{part}>" for part in (first.voice, first.seed) if part)
        text = self.texts[clip] = self.texts.get(clip, "") + message.text
        if "CRASH" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        elif "FAIL" in text:
            self.send(Spoken(clip, b"", last=True, error="it failed at /secret/path"))
        elif "STALL" in text:
            return
        elif first.format == "pcm16":
            flood = "." * 10_000_000 if text.endswith("FLOOD") else ""
            piece = (voice if message is first else "") + message.text + flood
            self.send(Spoken(clip, piece.encode(), last=message.last))
        elif message.last:
            said = text.replace("HUSHED", str(self.hushed))
            self.send(Spoken(clip, f"{first.format}:{voice}{said}".encode(), last=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    FakeSpeech(socket.socket(fileno=parser.parse_args().fd)).run()

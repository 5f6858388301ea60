"""Spoken answers from a real server: a tiny model and a tiny voice, through the unchanged openai client."""

from __future__ import annotations

import base64
import io
import os
import signal
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from server_process import Server, serving
from waiting import eventually

from tokenmill.engine.tiny import make_tiny
from tokenmill.engine.tiny_speech import make_tiny_vits

CONFIG = """
version: 1
defaults: {{dtype: float32, device: cpu}}
models:
  tiny/llama:
    source: {tiny}
    max_context: 512
    speech: {{source: {voice}, threads: 1, voices: {{alloy: 1}}}}
"""
REQUEST: dict[str, Any] = {
    "model": "tiny/llama",
    "messages": [{"role": "user", "content": "Where does the mill stand?"}],
    "modalities": ["text", "audio"],
    "max_tokens": 60,
    "temperature": 0,
    "seed": 3,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("speech")
    config = folder / "models.yaml"
    voice = make_tiny_vits(folder / "voice", speakers=3)
    config.write_text(CONFIG.format(tiny=make_tiny("llama", folder / "tiny"), voice=voice))
    with serving(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def spoken(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{**REQUEST, **fields}).choices[0].message


def test_each_format_is_a_file_of_the_same_sound(client: openai.OpenAI) -> None:
    lengths = {}
    for form in ("wav", "flac", "mp3", "opus"):
        message = spoken(client, audio={"voice": "alloy", "format": form})
        assert (message.content, bool(message.audio.transcript)) == (None, True)
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)))
        lengths[form] = len(samples) / rate
        assert np.abs(samples).max() > 0.05
    assert max(lengths.values()) - min(lengths.values()) < 0.15, lengths


def test_a_stream_is_its_plain_twin(client: openai.OpenAI) -> None:
    whole = spoken(client, audio={"voice": "2", "format": "pcm16"}).audio
    stream = client.chat.completions.create(**REQUEST, audio={"voice": "2", "format": "pcm16"}, stream=True)
    pieces = [chunk.choices[0].delta.audio for chunk in stream if chunk.choices[0].delta.audio]
    assert "".join(piece.transcript or "" for piece in pieces) == whole.transcript
    heard = b"".join(base64.b64decode(piece.data) for piece in pieces if piece.data)
    expected = np.frombuffer(base64.b64decode(whole.data), "<i2").astype(int)
    assert len(heard) == 2 * len(expected)
    assert np.abs(np.frombuffer(heard, "<i2") - expected).max() <= 4, "the same but for rounding"


def test_text_is_what_it_is_without_sound(client: openai.OpenAI) -> None:
    text = spoken(client, modalities=["text"])
    assert text.audio is None
    assert spoken(client).audio.transcript == text.content


def test_completions_are_spoken(client: openai.OpenAI) -> None:
    extra = {"modalities": ["text", "audio"], "audio": {"voice": "0"}}
    answer = client.completions.create(
        model="tiny/llama", prompt=["The mill", "The river"], n=2, max_tokens=20, extra_body=extra
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        audio: Any = choice.model_dump()["audio"]
        assert audio["transcript"] == choice.text
        with wave.open(io.BytesIO(base64.b64decode(audio["data"]))) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)


def test_an_unknown_voice_lists_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="alloy, 0, 1, 2"):
        spoken(client, audio={"voice": "nova", "format": "wav"})


def test_the_front_end_still_loads_no_torch(server: Server, client: openai.OpenAI) -> None:
    assert spoken(client).audio
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "python" in maps
    assert "libtorch" not in maps
    assert "soundfile" not in maps


def speech_process(server: Server) -> int:
    """The process id of the server's only voice."""
    (voice,) = server.children("speech_host")
    return voice


def answers(client: openai.OpenAI) -> bool:
    """Whether it speaks again; until then it says so with 503."""
    try:
        return bool(spoken(client).audio.data)
    except openai.InternalServerError as error:
        if error.status_code != 503:
            raise
        return False


def test_a_killed_voice_comes_back_and_text_never_stopped(server: Server, client: openai.OpenAI) -> None:
    os.kill(speech_process(server), signal.SIGKILL)
    assert spoken(client, modalities=["text"]).content
    eventually(lambda: answers(client))
    assert server.get("/health").json()["models"]["tiny/llama:speech"] == "loaded"

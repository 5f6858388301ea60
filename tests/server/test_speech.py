"""`modalities: ["text", "audio"]` on both routes, whole and streamed, over a scripted speech process."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from chat_live import CALL, CHAT_ENGINE, TEMPLATES, TOOLS, says, user
from live_server import LiveServer, events
from waiting import eventually

from tokenmill.server.config_file import parse_config
from tokenmill.server.guard import Guard

SPOKEN = {"modalities": ["text", "audio"]}
CONFIG = f"""
version: 1
models:
  chat/plain:
    source: "chat:"
    speech: {{source: "fake:", voices: {{alloy: 1}}}}
    deployments:
      hermes: {{chat_template: {TEMPLATES}/hermes.jinja}}
      thinking: {{chat_template: {TEMPLATES}/thinking.jinja}}
  chat/bare: {{source: "chat:", speech: "fake:bare"}}
  chat/mute: {{source: "chat:", speech: "fake:load_failed"}}
  chat/silent: {{source: "chat:"}}
"""


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """A server whose models speak, but one, and one whose speech checkpoint is broken."""
    with LiveServer(parse_config(CONFIG), engine=CHAT_ENGINE) as running:
        yield ready(running)


@pytest.fixture
def own() -> Iterator[LiveServer]:
    """The same for a test that breaks it."""
    with LiveServer(parse_config(CONFIG), engine=CHAT_ENGINE) as running:
        yield ready(running)


def ready(live: LiveServer) -> LiveServer:
    def status() -> dict[str, str]:
        return dict(live.client.get("/health").json()["models"])

    eventually(lambda: "loading" not in status().values())
    return live


def ask(live: LiveServer, model: str = "chat/plain", **fields: Any) -> httpx.Response:
    return live.client.post("/v1/chat/completions", json={"model": model, **SPOKEN, **fields})


def chat(live: LiveServer, model: str = "chat/plain", **fields: Any) -> dict[str, Any]:
    response = ask(live, model, **fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def message(live: LiveServer, model: str = "chat/plain", **fields: Any) -> dict[str, Any]:
    (choice,) = chat(live, model, **fields)["choices"]
    return dict(choice["message"])


def complete(live: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    response = live.complete(**{"model": "chat/plain", **SPOKEN, **fields})
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(event) for event in data]


def sound(audio: dict[str, Any]) -> str:
    return base64.b64decode(audio["data"]).decode()


def refused(response: httpx.Response, status: int, code: str | None, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    return str(error["message"])


def test_a_message_is_spoken(live: LiveServer) -> None:
    before = int(time.time())
    spoken = message(live, messages=says("Hello there."))
    assert set(spoken) == {"role", "content", "refusal", "audio"}
    assert spoken["content"] is None
    audio = spoken["audio"]
    assert set(audio) == {"id", "data", "transcript", "expires_at"}
    assert re.fullmatch(r"audio_[0-9a-f]{24}", audio["id"])
    assert audio["transcript"] == "Hello there."
    assert before <= audio["expires_at"] <= time.time()
    assert sound(audio) == "wav:<alloy>Hello there."


def test_text_alone_is_as_ever(live: LiveServer) -> None:
    for modalities in (None, ["text"]):
        assert message(live, messages=says("Hello"), modalities=modalities) == {
            "role": "assistant",
            "content": "Hello",
            "refusal": None,
        }


@pytest.mark.parametrize("form", ["wav", "pcm16", "flac", "mp3", "opus"])
def test_each_format(live: LiveServer, form: str) -> None:
    audio = message(live, messages=says("Hi"), audio={"format": form})["audio"]
    assert sound(audio) == ("<alloy>Hi" if form == "pcm16" else f"{form}:<alloy>Hi")


@pytest.mark.parametrize("voice", ["1", {"id": "1"}])
def test_each_voice(live: LiveServer, voice: object) -> None:
    assert sound(message(live, messages=says("Hi"), audio={"voice": voice})["audio"]) == "wav:<1>Hi"


def test_the_seed_counts_for_the_sound_too_by_choice(live: LiveServer) -> None:
    body = chat(live, messages=says("a|||b"), n=2, seed=7)
    said = [sound(choice["message"]["audio"]) for choice in body["choices"]]
    assert said == ["wav:<alloy><7/0>a", "wav:<alloy><7/1>b"]
    choices = complete(live, prompt=["«a|||b»", "«c|||d»"], n=2, seed=7, max_tokens=9)
    assert [sound(choice["audio"]) for choice in choices] == [
        f"wav:<alloy><7/{stream}>{text}" for stream, text in ((0, "a"), (1, "b"), (0, "c"), (1, "d"))
    ]


def test_only_what_is_returned_is_spoken(live: LiveServer) -> None:
    choices = complete(live, prompt="«aa|||bb|||cc»", n=1, best_of=3, max_tokens=9)
    assert sound(choices[0]["audio"]) == "wav:<alloy>" + choices[0]["text"]


def test_a_completion_keeps_its_text(live: LiveServer) -> None:
    (choice,) = complete(live, prompt="«Hello there.»", max_tokens=30, logprobs=0)
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "audio"}
    assert (choice["text"], choice["finish_reason"]) == ("Hello there.", "stop")
    assert choice["audio"]["transcript"] == "Hello there."
    assert sound(choice["audio"]) == "wav:<alloy>Hello there."


def test_nothing_to_say_is_no_sound(live: LiveServer) -> None:
    spoken = message(live, messages=says("NOTHING"))
    assert (spoken["content"], spoken["audio"]) == ("", None)
    (choice,) = complete(live, prompt="«NOTHING»")
    assert (choice["text"], choice["audio"]) == ("", None)


def test_calls_and_thoughts_are_not_spoken(live: LiveServer) -> None:
    fields = {"model": "chat/plain/hermes", "tools": TOOLS}
    called = message(live, **fields, messages=says(CALL))
    assert (called["content"], called["audio"]) == (None, None)
    assert called["tool_calls"][0]["function"]["name"] == "get_weather"
    both = message(live, **fields, messages=says(f"One moment.{CALL}"))
    assert both["audio"]["transcript"] == "One moment."
    assert both["tool_calls"]
    thought = message(live, "chat/plain/thinking", messages=says("<think>hm, well</think>Paris."))
    assert thought["reasoning_content"] == "hm, well"
    assert sound(thought["audio"]) == "wav:<alloy>Paris."


def test_a_completion_with_tools_is_spoken(live: LiveServer) -> None:
    fields = {
        "model": "chat/plain/hermes",
        "prompt": f"«One moment.{CALL}»",
        "tools": TOOLS,
        "max_tokens": 200,
    }
    (choice,) = complete(live, **fields)
    assert choice["text"] == "One moment."
    assert sound(choice["audio"]) == "wav:<alloy>One moment."
    assert choice["tool_calls"]


def test_usage_counts_no_audio_tokens(live: LiveServer) -> None:
    spoken, text = (chat(live, messages=says("Hello"), modalities=m) for m in (["text", "audio"], ["text"]))
    assert {**spoken["usage"], "prompt_tokens_details": None} == {
        **text["usage"],
        "prompt_tokens_details": None,
    }
    assert spoken["usage"]["completion_tokens_details"]["audio_tokens"] == 0


def test_a_streamed_message(live: LiveServer) -> None:
    text = "Hello there. " * 20
    response = ask(live, messages=says(text), stream=True, stream_options={"include_usage": True})
    *parts, usage = chunks(response)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 20
    assert {part["usage"] for part in parts} == {None}
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    first, *middle, last = [part["choices"][0] for part in parts]
    assert first["delta"] == {"role": "assistant", "content": None, "refusal": None}
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    audio = [choice["delta"]["audio"] for choice in middle]
    assert all(set(choice["delta"]) == {"audio"} and choice["finish_reason"] is None for choice in middle)
    assert [list(piece) for piece in audio if "id" in piece] == [["id", "transcript"]]
    assert "id" in audio[0]
    assert "".join(piece.get("transcript", "") for piece in audio) == text
    assert list(audio[-1]) == ["expires_at"]
    pieces = [piece["data"] for piece in audio if "data" in piece]
    assert len(pieces) > 1
    heard = b"".join(base64.b64decode(piece) for piece in pieces).decode()
    assert heard == f"<alloy>{text}"
    assert base64.b64decode("".join(pieces)).decode() == heard, "pieces may be joined before they are decoded"


def test_a_streamed_completion(live: LiveServer) -> None:
    body = {
        "model": "chat/plain",
        "prompt": ["«one|||two»", "«three|||»"],
        "n": 2,
        "max_tokens": 30,
        **SPOKEN,
    }
    parts = chunks(live.client.post("/v1/completions", json={**body, "stream": True, "seed": 5}))
    for index, (stream, text) in enumerate(((0, "one"), (1, "two"), (0, "three"), (1, ""))):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == text
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        audio = [choice["audio"] for choice in own if "audio" in choice]
        heard = b"".join(base64.b64decode(piece["data"]) for piece in audio if "data" in piece).decode()
        assert heard == (f"<alloy><5/{stream}>{text}" if text else "")
        assert [list(piece) for piece in audio][-1:] == ([["expires_at"]] if text else [])


def test_a_streamed_call_is_not_spoken(live: LiveServer) -> None:
    response = ask(live, "chat/plain/hermes", messages=says(CALL), tools=TOOLS, stream=True)
    choices = [part["choices"][0] for part in chunks(response)]
    assert not any("audio" in choice["delta"] for choice in choices)
    assert any("tool_calls" in choice["delta"] for choice in choices)
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_the_gateways_stream_ends_without_done(live: LiveServer) -> None:
    body = {"model": "chat/plain", "prompt": "«Hi»", "stream": True, **SPOKEN}
    data = events(live.client.post("/v4/beta/completions", json=body))
    assert json.loads(data[-1])["choices"][0]["finish_reason"] == "stop"
    assert any("audio" in json.loads(event)["choices"][0] for event in data)


def test_the_openai_client_hears(live: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        wanted: dict[str, Any] = {
            "model": "chat/plain",
            "messages": says("Hi"),
            "modalities": ["text", "audio"],
        }
        answer = client.chat.completions.create(**wanted, audio={"voice": "alloy", "format": "mp3"})
        audio = answer.choices[0].message.audio
        assert base64.b64decode(audio.data) == b"mp3:<alloy>Hi"
        stream = client.chat.completions.create(
            **wanted, audio={"voice": "1", "format": "pcm16"}, stream=True
        )
        # As plain data: older clients know no type for it.
        deltas = [chunk.model_dump()["choices"][0]["delta"] for chunk in stream]
        pieces = [audio for delta in deltas if (audio := delta.get("audio"))]
        assert b"".join(base64.b64decode(piece.get("data") or "") for piece in pieces) == b"<1>Hi"
        assert "".join(piece.get("transcript") or "" for piece in pieces) == "Hi"
        history = [*says("x"), answer.choices[0].message.model_dump(), *says("PROMPT")]
        again = client.chat.completions.create(model="chat/plain", messages=history)  # type: ignore[arg-type]
        assert "[assistant]Hi\n" in (again.choices[0].message.content or "")


def test_a_spoken_answer_in_the_history_needs_its_transcript(live: LiveServer) -> None:
    past = {"role": "assistant", "audio": {"id": "audio_1"}}
    response = ask(live, messages=[*user("a"), past, *user("b")])
    assert "transcript" in refused(response, 400, None, "messages")
    response = ask(live, messages=[{"role": "user", "content": "a", "audio": {"id": "audio_1"}}])
    assert "assistant" in refused(response, 400, None, "messages")


def test_a_model_without_speech(live: LiveServer) -> None:
    response = ask(live, "chat/silent", messages=says("a"))
    assert "can't speak" in refused(response, 400, "unsupported_modality", "modalities")


def test_a_lazy_model_without_speech_is_not_loaded_to_say_so(start: Callable[..., LiveServer]) -> None:
    live = start("models: {a/b: {source: 'fake:', load: lazy}}\n")
    refused(live.complete(prompt="a", **SPOKEN), 400, "unsupported_modality", "modalities")
    assert live.client.get("/health").json()["models"] == {"a/b": "unloaded"}


def test_an_unknown_voice_is_answered_with_the_known_ones(live: LiveServer) -> None:
    response = ask(live, messages=says("a"), audio={"voice": "nova"})
    assert refused(response, 400, "unknown_voice", "audio").endswith(
        "has no voice 'nova'; it has alloy, 0, 1"
    )


def test_a_format_that_cannot_be_written_here(live: LiveServer) -> None:
    response = ask(live, "chat/bare", messages=says("a"), audio={"format": "mp3"})
    assert "soundfile" in refused(response, 400, "unsupported_format", "audio")
    assert message(live, "chat/bare", messages=says("a"))["audio"]


def test_the_list_of_models_tells_of_their_speech(live: LiveServer) -> None:
    rows = {row["id"]: row for row in live.client.get("/v1/models").json()["data"]}
    formats = ["wav", "pcm16", "flac", "mp3", "opus"]
    loaded = {"status": "loaded", "voices": ["alloy", "0", "1"], "formats": formats}
    assert rows["chat/plain"]["speech"] == rows["chat/plain/hermes"]["speech"] == loaded
    assert "speech" not in rows["chat/silent"]
    assert rows["chat/mute"]["status"] == "loaded"
    assert rows["chat/mute"]["speech"]["status"] == "failed"
    assert "truncated" in rows["chat/mute"]["speech"]["reason"]
    health = live.client.get("/health").json()["models"]
    assert (health["chat/plain:speech"], health["chat/mute:speech"]) == ("loaded", "failed")
    assert "chat/silent:speech" not in health


def test_a_checkpoint_that_cannot_be_loaded_costs_the_sound_alone(live: LiveServer) -> None:
    refused(ask(live, "chat/mute", messages=says("a")), 503, "model_failed", None)
    assert message(live, "chat/mute", messages=says("a"), modalities=["text"])["content"] == "a"


def test_more_than_can_be_spoken(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.server.speech.MAX_CHARACTERS", 100)
    text = "a" * 50
    assert len(chat(live, messages=says(text), n=2)["choices"]) == 2
    response = ask(live, messages=says(text), n=3)
    assert "the 100 characters" in refused(response, 400, "audio_too_long", "modalities")
    response = ask(live, messages=says(text), n=3, stream=True)
    assert json.loads(events(response)[-1])["error"]["code"] == "audio_too_long"


def test_an_utterance_that_fails_ends_its_request_alone(live: LiveServer) -> None:
    response = ask(live, messages=says("FAIL"))
    assert "/secret" not in refused(response, 500, "internal_error", None)
    response = ask(live, messages=says("well, FAIL"), stream=True)
    last = json.loads(events(response)[-1])
    assert last["error"]["status_code"] == 500
    eventually(lambda: idle(live))
    assert message(live, messages=says("a"))["audio"]


def test_text_that_follows_a_failure_is_called_off(live: LiveServer) -> None:
    before = hushed(live)
    events(ask(live, messages=says("FAIL, and HOLD"), stream=True))
    eventually(lambda: idle(live))
    assert hushed(live) == before + 1


def idle(live: LiveServer) -> bool:
    """Whether no request holds a model or a voice."""
    kept = [model.voice or model for model in live.registry] + list(live.registry)
    return all((one.queued, one.started) == (0, 0) for one in kept)


def speaks(live: LiveServer) -> bool:
    """Whether a clip is under way at `chat/plain`."""
    voice = next(iter(live.registry)).voice
    assert voice is not None
    assert voice.engine is not None
    return bool(voice.engine.client._sinks)


def hushed(live: LiveServer) -> int:
    """Clips that were called off."""
    return int(sound(message(live, messages=says("HUSHED"))["audio"]).rpartition(">")[2])


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_stops_the_sound(live: LiveServer, guards: list[Guard], stream: bool) -> None:
    before = hushed(live)
    guards.clear()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, live, messages=says("STALL"), stream=stream)
        eventually(lambda: speaks(live))
        live.call(guards[0].late)
        response = asking.result()
    if stream:
        assert json.loads(events(response)[-1])["error"]["code"] == "timeout"
    else:
        refused(response, 504, "timeout", None)
    eventually(lambda: idle(live))
    assert hushed(live) == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_sound(live: LiveServer, stream: bool) -> None:
    before = hushed(live)
    body = {"model": "chat/plain", "messages": says("STALL"), "stream": stream, **SPOKEN}
    with live.open("/v1/chat/completions", **body):
        eventually(lambda: speaks(live))
    eventually(lambda: idle(live))
    assert hushed(live) == before + 1


def test_a_reader_that_stops_reading_is_given_up(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound that nobody takes is bounded: here each piece is more than that, while a send waits."""
    monkeypatch.setattr("tokenmill.server.http_protocol.STALL_S", 0.1)
    body = {"model": "chat/plain", "messages": says("FLOOD" * 4), "stream": True, **SPOKEN}
    with live.client.stream("POST", "/v1/chat/completions", json=body):
        eventually(lambda: idle(live))
    assert message(live, messages=says("a"))["audio"]


def test_a_process_that_dies_fails_its_requests_and_comes_back(
    own: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.server.supervised.FIRST_RESTART_S", 0.3)
    refused(ask(own, messages=says("CRASH")), 503, "speech_down", None)
    response = ask(own, messages=says("a"))
    assert response.status_code == 200 or response.json()["error"]["code"] == "engine_down"
    assert message(own, messages=says("a"), modalities=["text"])["content"] == "a"
    eventually(lambda: ask(own, messages=says("a")).status_code == 200)
    last = json.loads(events(ask(own, messages=says("CRASH"), stream=True))[-1])
    assert last["error"]["code"] == "speech_down"


def test_a_full_queue_of_the_voice() -> None:
    config = parse_config("server: {max_queue: 1}\nmodels: {a/b: {source: 'chat:', speech: 'fake:'}}\n")
    with LiveServer(config, engine=CHAT_ENGINE) as live:
        ready(live)
        (model,) = live.registry
        assert model.voice is not None
        model.voice.started, model.voice.queued = 1, 1
        response = ask(live, "a/b", messages=says("a"))
        refused(response, 429, "queue_full", None)
        assert response.headers["retry-after"]
        model.voice.started = model.voice.queued = 0
        assert message(live, "a/b", messages=says("a"))["audio"]


def test_unloading_a_model_takes_its_speech_along(start: Callable[..., LiveServer]) -> None:
    live = start("models: {a/b: {source: 'fake:', speech: 'fake:'}}\n", admin_keys=("admin-key-1",))
    ready(live)
    headers = {"authorization": "Bearer admin-key-1"}
    row = live.client.post("/v1/models/a/b/unload", headers=headers).json()
    assert (row["status"], row["speech"]) == ("unloaded", {"status": "unloaded"})
    row = live.client.post("/v1/models/a/b/load", headers=headers).json()
    assert row["status"] == "loaded"
    assert live.complete(prompt="a", max_tokens=4, **SPOKEN).json()["choices"][0]["audio"]


def test_a_lazy_model_speaks_when_it_is_asked(start: Callable[..., LiveServer]) -> None:
    live = start("models: {a/b: {source: 'fake:', speech: 'fake:', load: lazy}}\n")
    assert live.client.get("/health").json()["models"] == {"a/b": "unloaded", "a/b:speech": "unloaded"}
    assert live.complete(prompt="a", max_tokens=4).status_code == 200
    assert live.client.get("/health").json()["models"]["a/b:speech"] == "unloaded"
    assert live.complete(prompt="a", max_tokens=4, **SPOKEN).json()["choices"][0]["audio"]

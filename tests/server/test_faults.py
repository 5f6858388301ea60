"""The fault table: after every fault the canary answers as before, and nothing is left running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import HEAD, MODEL, ONE_MODEL, LiveServer, events
from waiting import PATIENCE_S, eventually

from tokenmill.engine.config import EngineConfig, SpeechConfig
from tokenmill.engine.messages import Alive, Loading
from tokenmill.server.guard import Guard
from tokenmill.server.model import Model
from tokenmill.server.supervised import Rules
from tokenmill.server.voice import Voice

Start = Callable[..., LiveServer]
ADMIN = {"authorization": "Bearer boss"}
SLOW = 'models: {toy/echo: {source: "fake:step_s=0.02", max_context: 20000}}'


@pytest.fixture
def slow(start: Start) -> LiveServer:
    """A server whose model takes 20 ms a token."""
    return start(SLOW)


@pytest.fixture
def far_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is down stays so until `load` is told to spare the pause."""
    monkeypatch.setattr("tokenmill.server.supervised.FIRST_RESTART_S", 60.0)


def load(server: LiveServer) -> bool:
    """`POST /v1/models/…/load`, with the admin key `boss`; whether it is loaded."""
    return server.client.post(f"/v1/models/{MODEL}/load", headers=ADMIN).is_success


def open_stream(server: LiveServer, **fields: Any) -> socket.socket:
    """A connection with a long request on its way."""
    return server.open(**{"prompt": "abc", "max_tokens": 10_000, **fields})


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"n": 8, "stream": True}, {"prompt": ["a", "b"], "n": 3}]
)
def test_client_that_leaves_frees_everything(slow: LiveServer, fields: dict[str, Any]) -> None:
    """Rows 21: in a stream, in a call that isn't streamed, with n > 1."""
    before = slow.canary()
    clients = [open_stream(slow, **fields) for _ in range(10)]
    eventually(lambda: slow.registry.unanswered == 10)
    eventually(lambda: slow.model.stats is not None and slow.model.stats.running >= 10)
    for client in clients:
        client.close()
    eventually(slow.is_idle)
    assert slow.canary() == before


def test_client_that_leaves_the_queue(start: Start) -> None:
    """Row 21: before its first token."""
    live = start('models: {toy/echo: {source: "fake:step_s=0.02", max_context: 20000, max_batch: 1}}')
    first = open_stream(live)
    eventually(lambda: live.model.started == 1)
    waiting = [open_stream(live) for _ in range(5)]
    eventually(lambda: live.model.queued == 5)
    for client in waiting:
        client.close()
    eventually(lambda: live.model.queued == 0)
    first.close()
    eventually(live.is_idle)
    assert live.canary()


def test_client_that_leaves_while_the_model_loads(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:load_s=600"}}')
    client = open_stream(live)
    eventually(lambda: live.registry.unanswered == 1)
    client.close()
    eventually(lambda: live.registry.unanswered == 0)
    assert live.model.status == "loading"


def test_reader_that_stops_reading_is_aborted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 22: its deltas coalesce up to a bound, the others go on; its connection isn't kept, either."""
    monkeypatch.setattr("tokenmill.server.http_protocol.STALL_S", 0.1)
    live = start('models: {toy/echo: {source: "fake:step_s=0", max_context: 10000000}}')
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", live.port))
    fields = {"prompt": "abc", "max_tokens": 5_000_000, "stream": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(fields).encode()
    lazy.sendall(HEAD % (b"/v1/completions", len(body)) + body)
    eventually(lambda: live.registry.unanswered == 1)
    assert live.complete(prompt="abc", max_tokens=300).status_code == 200
    eventually(live.is_idle)
    # What is left is the test's own connection.
    eventually(lambda: len(live._server.server_state.connections) == 1)
    lazy.close()
    assert live.canary()


def test_full_queue_refuses_and_drops_nothing(start: Start) -> None:
    """Row 23."""
    live = start(
        """
server: {max_queue: 2}
models: {toy/echo: {source: "fake:step_s=0.01", max_batch: 2}}
"""
    )
    live.canary()
    eventually(live.is_idle)
    with ThreadPoolExecutor(12) as pool:
        with live.paused():
            calls = [pool.submit(live.complete, prompt="abc", max_tokens=60) for _ in range(12)]
            eventually(lambda: sum(call.done() for call in calls) == 8)
            refused = [call.result() for call in calls if call.done()]
        answers = [call.result() for call in calls]
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    accepted = [answer for answer in answers if answer not in refused]
    assert [len(answer.json()["choices"][0]["text"]) for answer in accepted] == [60] * 4
    assert live.canary()


@pytest.mark.parametrize("name", ["inference_timeout", "timeout"])
def test_deadline_of_a_running_request(slow: LiveServer, name: str) -> None:
    """Row 24, running."""
    slow.canary()
    response = slow.complete(prompt="abc", max_tokens=10_000, **{name: "0.3"})
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("timeout", name)
    eventually(slow.is_idle)


@pytest.mark.parametrize(("path", "gateway"), [("/v1/completions", False), ("/v4/beta/completions", True)])
def test_deadline_in_a_stream_is_the_error_event(
    slow: LiveServer, guards: list[Guard], path: str, gateway: bool
) -> None:
    """Rows 24 and 32."""
    body = {"prompt": "abc", "max_tokens": 10_000, "stream": True}
    with slow.client.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        slow.call(guards[0].late)
        *parts, last = [json.loads(line[6:]) for line in (first, *lines) if line]
    assert all(part["choices"][0]["finish_reason"] is None for part in parts)
    assert last["error"]["code"] == "timeout"
    assert last["error"]["status_code"] == 504
    assert last.get("choices") == ([] if gateway else None)
    eventually(slow.is_idle)


def test_deadline_in_the_queue(start: Start) -> None:
    """Row 24, waiting; the entry's own timeout_s."""
    live = start(
        'models: {toy/echo: {source: "fake:step_s=0.02", max_batch: 1, max_context: 20000, timeout_s: 0.5}}'
    )
    holder = open_stream(live, timeout=600)
    eventually(lambda: live.model.started == 1)
    assert live.complete(prompt="abc", stream=True).status_code == 504
    holder.close()
    eventually(live.is_idle)
    assert live.complete(prompt="abc", timeout=600).is_success


def test_sequence_larger_than_the_whole_cache(start: Start) -> None:
    """Row 26."""
    live = start('models: {toy/echo: {source: "fake:", max_context: 2048, num_blocks: 4}}')
    response = live.complete(prompt=[0] * 60, max_tokens=5)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert live.complete(prompt=[0] * 60, max_tokens=4).status_code == 200


@pytest.mark.usefixtures("far_restart")
def test_killed_engine(start: Start) -> None:
    """Row 28: everyone hears of it at once, health is red, and it comes back."""
    slow = start(SLOW, admin_keys=("boss",))
    before = slow.canary()
    stream = open_stream(slow, stream=True)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(slow.complete, prompt="abc", max_tokens=10_000) for _ in range(4)]
        eventually(lambda: slow.model.started == 5)
        assert slow.pid is not None
        os.kill(slow.pid, signal.SIGKILL)
        for answer in answers:
            response = answer.result(timeout=PATIENCE_S)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_down"
    rest = b""
    while part := stream.recv(65536):
        rest += part
        if b"0\r\n\r\n" in rest:
            break
    last = [line for line in rest.split(b"\n") if line.startswith(b"data: ")][-1]
    assert json.loads(last[6:])["error"]["status_code"] == 503
    assert b"[DONE]" not in rest
    health = slow.client.get("/health")
    assert health.status_code == 503
    assert slow.client.get(f"/health/{MODEL}").status_code == 503
    refused = slow.complete(prompt="abc")
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    # The lost connection is known at once, its cause when the process has been collected.
    reason = "was ended by SIGKILL; restart in 60 s"
    eventually(lambda: reason in slow.client.get("/v1/models").json()["data"][0].get("reason", ""))
    assert load(slow)
    assert slow.client.get("/health").status_code == 200
    assert slow.canary() == before


def test_prompt_that_crashes_the_engine(start: Start) -> None:
    """Row 28, by a request; its neighbours fail with it, the server stays."""
    live = start(ONE_MODEL)
    before = live.canary()
    assert live.complete(prompt="CRASH").status_code == 503
    eventually(lambda: live.client.get("/health").status_code == 200)
    assert live.canary() == before


def test_engine_that_sends_garbage_is_restarted(start: Start) -> None:
    live = start(ONE_MODEL)
    before = live.canary()
    assert live.complete(prompt="GARBAGE").status_code == 503
    eventually(lambda: live.client.get("/health").status_code == 200)
    assert live.canary() == before


@pytest.mark.usefixtures("far_restart")
def test_hanging_engine_is_restarted_by_the_watchdog(start: Start) -> None:
    """Row 29."""
    text = "server: {watchdog_s: 2}\n" + ONE_MODEL.replace("version: 1\n", "")
    live = start(text, admin_keys=("boss",))
    with live.unwatched():
        before = live.canary()
    response = live.complete(prompt="HANG", max_tokens=5)
    assert response.status_code == 503
    assert live.client.get("/health").status_code == 503
    with live.unwatched():
        assert load(live)
        assert live.canary() == before


@pytest.mark.usefixtures("far_restart")
def test_engine_that_hangs_while_loading_is_restarted(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 29, before there is an engine to be silent. A request that waits for it gets its answer."""
    hung = tmp_path / "hung"
    text = "server: {load_silence_s: 2}\n" + ONE_MODEL.replace("version: 1\n", "")
    live = start(text, mode=f"hang_loading:{hung}", admin_keys=("boss",))
    assert live.complete(prompt="abc", max_tokens=2).status_code == 503
    assert "silent for 2 s while loading; restart in" in caplog.text
    hung.touch()
    with live.unwatched():
        assert load(live)
        assert live.canary()


def loading(kind: type[Model] | type[Voice]) -> Model | Voice:
    """One that may load for two seconds in silence and for four without progress."""
    rules = Rules(load_silence_s=2, load_watchdog_s=4)
    if kind is Model:
        return Model(MODEL, EngineConfig(source="x"), rules)
    return Voice(MODEL, SpeechConfig(source="x"), rules)


@pytest.mark.parametrize("kind", [Model, Voice])
def test_silence_while_loading_is_a_hang(kind: type[Model] | type[Voice]) -> None:
    kept = loading(kind)
    for message in (Loading("weights", 0.5), Alive()):
        kept.on_message(message)
        assert kept._hang() is None, "one tick"
    assert kept._hang() == "the engine was silent for 2 s while loading"


@pytest.mark.parametrize("kind", [Model, Voice])
def test_who_lives_may_load_slowly_but_not_for_ever(kind: type[Model] | type[Voice]) -> None:
    kept = loading(kind)
    for _ in range(3):
        assert kept._hang() is None
        kept.on_message(Alive())
    for _ in range(3):
        kept.on_message(Loading("weights", 0.5))
        assert kept._hang() is None
        kept.on_message(Alive())
    assert kept._hang() is None
    kept.on_message(Alive())
    assert kept._hang() is None
    kept.on_message(Alive())
    assert kept._hang() == "the engine made no progress for 4 s while loading"


def test_row_that_fails_fails_alone(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    """Rows 30 and 32: a fixed text, the reason only in the log; its neighbour ends as ever."""
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(server.complete, prompt="abc", max_tokens=50)
        response = server.complete(prompt="NANROW")
        assert neighbour.result().json()["choices"][0]["text"] == ("abc" * 17)[:50]
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert "/secret/path" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert "/secret/path" in caplog.text
    *parts, last = [json.loads(event) for event in events(server.complete(prompt="NANROW", stream=True))]
    assert [part["choices"][0]["text"] for part in parts]
    assert last["error"]["status_code"] == 500
    assert all(part["choices"][0]["finish_reason"] is None for part in parts)


def test_model_that_can_not_be_loaded(start: Start) -> None:
    """Row 35: its reason is told, nothing is tried again."""
    live = start(ONE_MODEL, mode="load_failed")
    eventually(lambda: live.client.get("/health").json()["models"] == {MODEL: "failed"})
    (row, *_) = live.client.get("/v1/models").json()["data"]
    assert row["status"] == "failed"
    assert row["reason"] == "model.safetensors: truncated; download it again"
    response = live.complete(prompt="abc")
    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "false"


def test_engine_that_dies_while_loading_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.server.supervised.FIRST_RESTART_S", 0.01)
    monkeypatch.setattr("tokenmill.server.supervised.STEADY_S", 0.0)  # long loading isn't long service
    live = start(ONE_MODEL, mode="crash_loading")
    eventually(lambda: live.client.get("/health").json()["models"] == {MODEL: "failed"})
    eventually(
        lambda: "restart" not in live.client.get(f"/v1/models/{MODEL}").json().get("reason", "restart")
    )
    assert "SIGKILL" in live.client.get(f"/v1/models/{MODEL}").json()["reason"]
    assert live.complete(prompt="a").status_code == 503


def test_other_models_serve_on(start: Start) -> None:
    """Row 28: one engine's end is nobody else's."""
    live = start('models: {toy/echo: {source: "fake:"}, toy/other: {source: "fake:"}}')
    assert live.canary()
    assert live.complete(model="toy/other", prompt="CRASH").status_code == 503
    health = live.client.get("/health")
    assert (health.status_code, health.json()["models"][MODEL]) == (200, "loaded")
    assert live.client.get("/health/toy/other").status_code == 503
    assert live.canary()
    message = live.complete(prompt="abc").json()["error"]
    assert message["param"] == "model", "with two models a request must say which"


def test_requests_wait_for_a_model_that_loads(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:load_s=0.5"}}')
    assert live.complete(prompt="abc", max_tokens=2).json()["choices"][0]["text"] == "ab"


def test_loading_model_refuses_at_once_when_told_to(start: Start) -> None:
    live = start('server: {load_wait_s: 0}\nmodels: {toy/echo: {source: "fake:load_s=600"}}')
    response = live.complete(prompt="abc")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"
    assert int(response.headers["retry-after"]) >= 1
    assert live.client.get("/health").status_code == 503


def test_deadline_while_the_model_loads(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:load_s=600"}}')
    assert live.complete(prompt="abc", timeout=0.2).status_code == 504


def test_lazy_model_loads_when_asked_and_unloads_when_idle(start: Start) -> None:
    entry = '{source: "fake:load_s=0.2,step_s=0.02", max_context: 20000, load: lazy, idle_unload_s: 1}'
    live = start(f"models: {{toy/echo: {entry}}}")
    assert live.client.get("/v1/models").json()["data"][0]["status"] == "unloaded"
    assert live.client.get("/health").status_code == 200
    busy = open_stream(live)
    first = live.canary()
    assert live.client.get("/health").json()["models"] == {MODEL: "loaded"}
    busy.close()
    eventually(lambda: live.client.get("/health").json()["models"] == {MODEL: "unloaded"})
    assert live.canary() == first


def test_draining_server_refuses_new_work(slow: LiveServer) -> None:
    """Row 31, the requests' side."""
    slow.canary()
    slow.registry.draining = True
    response = slow.complete(prompt="abc")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert slow.client.get("/health").status_code == 503
    assert slow.client.get("/live").status_code == 200


def test_absurd_counts_are_refused_at_once(server: LiveServer) -> None:
    """Row 5."""
    for fields in ({"n": 10**9}, {"best_of": 10**9}, {"n": 2, "best_of": 1}):
        assert server.complete(prompt="a", **fields).status_code == 400
    assert server.canary()


def test_body_over_the_limit(start: Start) -> None:
    """Row 18, with and without Content-Length."""
    live = start('server: {max_body_mb: 0.01}\nmodels: {toy/echo: {source: "fake:"}}')
    body = json.dumps({"prompt": "a" * 20_000}).encode()
    headers = {"content-type": "application/json"}
    assert live.client.post("/v1/completions", content=body, headers=headers).status_code == 413
    chunked = httpx.post(
        f"{live.url}/v1/completions",
        content=iter([body[:9000], body[9000:]]),
        headers=headers,
        timeout=PATIENCE_S,
    )
    assert chunked.status_code == 413
    assert set(chunked.json()["error"]) == {"message", "type", "param", "code"}
    assert live.canary()


def raw(server: LiveServer, data: bytes) -> bytes:
    """What the server answers to raw bytes until it closes, which may be before it has read them all."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
        return answer


def test_headers_without_end(server: LiveServer) -> None:
    """Row 19."""
    answer = raw(server, b"GET /live HTTP/1.1\r\nHost: x\r\nx-big: " + b"a" * 100_000)
    assert answer.startswith(b"HTTP/1.1 431")
    many = b"".join(b"x-%d: a\r\n" % i for i in range(20_000))
    assert raw(server, b"GET /live HTTP/1.1\r\nHost: x\r\n" + many).startswith(b"HTTP/1.1 431")
    answer = raw(server, b"GARBAGE\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert set(json.loads(answer.split(b"\r\n\r\n")[1])["error"]) == {"message", "type", "param", "code"}
    assert server.canary()


def test_slow_header_sender_is_closed(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 19."""
    monkeypatch.setattr("tokenmill.server.http_protocol.HEADER_TIMEOUT_S", 0.2)
    for beginning in (b"GET /live HTTP/1.1\r\nHo", b""):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(beginning)
            assert connection.recv(100) == b"", "closed by the server"


def test_a_body_that_stops_coming_is_refused(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.server.body.SILENCE_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        connection.sendall(HEAD % (b"/v1/completions", 100) + b"{")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert "stopped coming" in json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]


def test_bad_hosts_do_not_open_doors(start: Start) -> None:
    """Row 19: access is decided on the path alone."""
    live = start(keys=("secret",))
    for host in (b"a/?x=", b"/live", b"x/live?", b"live#", b"[::1", b""):
        answer = raw(live, b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert answer.split(b" ")[1] in (b"400", b"401"), answer

"""Loading and unloading by hand: who may, what it answers, and that no order of events leaves it stuck."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import MODEL, ONE_MODEL, LiveServer, eventually

Start = Callable[..., LiveServer]
ADMIN = {"authorization": "Bearer boss"}
CONFIG = 'models: {toy/echo: {source: "fake:step_s=0.005", max_context: 20000}}'
SLOW_LOAD = 'models: {toy/echo: {source: "fake:load_s=0.6"}}'


@pytest.fixture
def live(start: Start) -> LiveServer:
    """A preloaded model of 5 ms a token."""
    return start(CONFIG, admin_keys=("boss",))


def order(server: LiveServer, what: str, name: str = MODEL, **options: Any) -> httpx.Response:
    """`POST /v1/models/{name}/load` or `/unload`."""
    return httpx.post(f"{server.url}/v1/models/{name}/{what}", **{"headers": ADMIN, "timeout": 30, **options})


def status(server: LiveServer) -> str:
    return str(server.client.get("/health").json()["models"][MODEL])


def process_id(server: LiveServer) -> int | None:
    (model,) = server.registry
    return None if model._process is None else model._process.pid


def in_background(call: Callable[[], httpx.Response]) -> Future[httpx.Response]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def test_unload_and_load(live: LiveServer) -> None:
    before = live.canary()
    row = live.client.get(f"/v1/models/{MODEL}").json()
    pid = process_id(live)
    assert pid is not None
    for _ in range(2):
        answer = order(live, "unload")
        assert answer.status_code == 200
        assert answer.json() == {**row, "status": "unloaded", "max_model_len": None}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    refused = live.complete(prompt="abc")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_unloaded"
    assert f"POST /v1/models/{MODEL}/load" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
    assert live.client.post("/tokenize", json={"prompt": "abc"}).status_code == 503
    assert (process_id(live), status(live)) == (None, "unloaded"), "a request must not load it"
    for _ in range(2):
        answer = order(live, "load")
        assert (answer.status_code, answer.json()) == (200, row)
    assert live.canary() == before


def test_health_and_metrics_tell_of_it(live: LiveServer) -> None:
    """`/health` is about requests: all would be refused. The process itself is well."""
    assert order(live, "unload").is_success
    health = live.client.get("/health")
    assert (health.status_code, health.json()["models"]) == (503, {MODEL: "unloaded"})
    own = live.client.get(f"/health/{MODEL}")
    assert (own.status_code, own.json()["state"]) == (503, "unloaded")
    assert live.client.get("/live").status_code == 200
    loaded = f'tokenmill_model_loaded{{model="{MODEL}"}}'
    assert f"{loaded} 0" in live.client.get("/metrics").text
    assert order(live, "load").is_success
    assert live.client.get("/health").status_code == 200
    assert f"{loaded} 1" in live.client.get("/metrics").text


@pytest.mark.parametrize("path", ["/live", "/health", f"/health/{MODEL}"])
def test_probes_answer_head(live: LiveServer, path: str) -> None:
    """As some that watch servers ask: the status, without the body."""
    eventually(lambda: live.client.get("/health").status_code == 200)
    answer = live.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_another_model_keeps_the_server_healthy(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:"}, toy/other: {source: "fake:"}}', admin_keys=("boss",))
    assert order(live, "load", "toy/other").is_success
    assert order(live, "load").is_success
    assert order(live, "unload", "toy/other").is_success
    health = live.client.get("/health")
    assert health.status_code == 200
    assert health.json()["models"] == {MODEL: "loaded", "toy/other": "unloaded"}
    assert live.canary()


@pytest.mark.parametrize("name", [f"{MODEL}/greedy", "echo"])
def test_deployments_and_aliases_stand_for_their_entry(start: Start, name: str) -> None:
    live = start(ONE_MODEL, admin_keys=("boss",))
    assert order(live, "unload", name).json()["status"] == "unloaded"
    assert {row["status"] for row in live.client.get("/v1/models").json()["data"]} == {"unloaded"}
    answer = order(live, "load", name).json()
    assert (answer["id"], answer["status"]) == (MODEL if name == "echo" else name, "loaded")
    assert live.complete(model=f"{MODEL}/forced", prompt="abc").is_success


def test_running_requests_are_finished_first(live: LiveServer) -> None:
    live.canary()
    running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
    eventually(lambda: live.registry.unanswered == 1)
    unloading = in_background(lambda: order(live, "unload"))
    eventually(lambda: status(live) == "unloaded")
    assert not running.done()
    assert live.complete(prompt="abc").status_code == 503
    assert unloading.result(20).json()["status"] == "unloaded"
    assert running.done(), "the unload must not be over before the request is"
    assert running.result().json()["choices"][0]["text"] == ("abc" * 34)[:100]


def test_lazy_model_is_loaded_again_by_a_request(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:step_s=0.005", load: lazy}}', admin_keys=("boss",))
    assert order(live, "unload").json()["status"] == "unloaded", "nothing to do"
    before = live.canary()
    running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
    eventually(lambda: live.registry.unanswered == 1)
    first = process_id(live)
    unloading = in_background(lambda: order(live, "unload"))
    eventually(lambda: status(live) == "unloaded")
    assert live.client.get("/health").status_code == 200, "it is loaded when it is asked for"
    assert live.canary() == before, "this waits for the old process to go and the new one to come"
    assert running.result(20).is_success
    assert unloading.result(20).is_success
    assert process_id(live) != first


def test_load_while_it_unloads_comes_after(live: LiveServer) -> None:
    before = live.canary()
    first = process_id(live)
    running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
    eventually(lambda: live.registry.unanswered == 1)
    unloading = in_background(lambda: order(live, "unload"))
    eventually(lambda: status(live) == "unloaded")
    assert order(live, "load").json()["status"] == "loaded"
    assert running.result(20).is_success
    assert unloading.result(20).is_success
    assert process_id(live) not in (None, first)
    assert live.canary() == before


def test_unload_while_it_loads(start: Start) -> None:
    live = start(SLOW_LOAD, admin_keys=("boss",))
    waiting = in_background(lambda: live.complete(prompt="abc"))
    loading = in_background(lambda: order(live, "load"))
    eventually(lambda: live.registry.unanswered == 1)
    time.sleep(0.1)
    assert order(live, "unload").json()["status"] == "unloaded"
    assert waiting.result(20).json()["error"]["code"] == "model_unloaded"
    answer = loading.result(20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_unloaded")
    assert order(live, "load").is_success
    assert live.canary()


def test_unload_while_a_restart_is_due(live: LiveServer) -> None:
    live.canary()
    assert live.complete(prompt="CRASH").status_code == 503
    assert order(live, "unload").json()["status"] == "unloaded"
    time.sleep(1.5)
    assert (status(live), process_id(live)) == ("unloaded", None), "the restart must be off"
    assert order(live, "load").json()["status"] == "loaded"


def test_load_spares_the_pause_before_a_restart(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.server.supervised.FIRST_RESTART_S", 60.0)
    before = live.canary()
    assert live.complete(prompt="CRASH").status_code == 503
    eventually(lambda: "restart in 60 s" in live.client.get(f"/v1/models/{MODEL}").json().get("reason", ""))
    assert order(live, "load").json()["status"] == "loaded"
    assert live.canary() == before


def test_crash_while_it_unloads(live: LiveServer) -> None:
    live.canary()
    running = in_background(lambda: live.complete(prompt="abc", max_tokens=10_000, ignore_eos=True))
    eventually(lambda: live.registry.unanswered == 1)
    pid = process_id(live)
    assert pid is not None
    unloading = in_background(lambda: order(live, "unload"))
    eventually(lambda: status(live) == "unloaded")
    os.kill(pid, signal.SIGKILL)
    assert running.result(20).status_code == 503
    assert unloading.result(20).json()["status"] == "unloaded"
    assert status(live) == "unloaded"


def test_hang_while_it_unloads(start: Start) -> None:
    live = start("server: {watchdog_s: 2}\n" + CONFIG, admin_keys=("boss",))
    live.canary()
    hanging = in_background(lambda: live.complete(prompt="HANG"))
    eventually(lambda: live.registry.unanswered == 1)
    assert order(live, "unload").json()["status"] == "unloaded"
    assert hanging.result(20).status_code == 503


def test_load_says_why_it_failed(start: Start) -> None:
    live = start(ONE_MODEL, mode="load_failed", admin_keys=("boss",))
    for _ in range(2):
        answer = order(live, "load")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
        assert "truncated; download it again" in answer.json()["error"]["message"]
    assert order(live, "unload").json()["status"] == "unloaded"


def test_shutdown_ends_the_wait(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:load_s=20"}}', admin_keys=("boss",))
    loading = in_background(lambda: order(live, "load"))
    eventually(lambda: process_id(live) is not None)
    time.sleep(0.2)
    live._server.should_exit = True
    live._loop.call_soon_threadsafe(lambda: live._loop.create_task(live.registry.stop()))
    assert loading.result(10).status_code == 503


def test_draining_server_takes_no_orders(live: LiveServer) -> None:
    live.canary()
    live.registry.draining = True
    for what in ("load", "unload"):
        assert order(live, what).json()["error"]["code"] == "draining"
    assert status(live) == "loaded"


def test_any_order_of_events_leaves_it_able_to_serve(live: LiveServer) -> None:
    """Orders, requests and crashes at once; afterwards one load brings the model back as it was."""
    before = live.canary()
    dice = random.Random(5)
    events: list[Callable[[], httpx.Response]] = [
        lambda: order(live, "load"),
        lambda: order(live, "unload"),
        lambda: live.complete(prompt="abc", max_tokens=20),
        lambda: live.complete(prompt="CRASH"),
    ]
    with ThreadPoolExecutor(8) as pool:
        futures = []
        for _ in range(60):
            futures.append(pool.submit(dice.choices(events, [4, 4, 6, 1])[0]))
            time.sleep(dice.random() * 0.05)
        answers = {future.result(60).status_code for future in futures}
    assert answers <= {200, 409, 503}, answers
    assert order(live, "load").json()["status"] == "loaded"
    assert live.canary() == before
    eventually(live.is_idle)
    assert order(live, "unload").is_success
    assert process_id(live) is None


# Access


@pytest.mark.parametrize("what", ["load", "unload"])
@pytest.mark.parametrize("keys", [(), ("plain",)])
def test_only_an_admin_key_will_do(start: Start, what: str, keys: tuple[str, ...]) -> None:
    live = start(ONE_MODEL, keys=keys, admin_keys=("boss",))
    for headers, expected, code in (
        ({}, 401, "invalid_api_key"),
        ({"x-api-key": "wrong"}, 401, "invalid_api_key"),
        ({"x-api-key": "plain"}, 403 if keys else 401, "admin_key_required" if keys else "invalid_api_key"),
        ({"authorization": "Bearer plain", "x-api-key": "boss"}, 403 if keys else 401, None),
    ):
        answer = order(live, what, headers=headers)
        assert answer.status_code == expected, headers
        assert code in (None, answer.json()["error"]["code"])
    assert order(live, what).is_success
    assert live.client.get("/v1/models", headers=ADMIN).is_success, "it opens the rest too"
    assert live.client.get("/v1/models").is_success == (not keys)


def test_without_admin_keys_nobody_may(start: Start) -> None:
    live = start(ONE_MODEL, keys=("plain",))
    answer = order(live, "unload", headers={"x-api-key": "plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_keys_not_configured")
    assert "TOKENMILL_ADMIN_KEYS" in answer.json()["error"]["message"]
    nameless = start('server: {admin_keys_env: null}\nmodels: {toy/echo: {source: "fake:"}}')
    message = order(nameless, "load").json()["error"]["message"]
    assert "server.admin_keys_env" in message


def test_wrong_orders(live: LiveServer) -> None:
    assert order(live, "load", "toy/eco").status_code == 404
    assert httpx.get(f"{live.url}/v1/models/{MODEL}/load").status_code == 404
    assert order(live, "load", json={}).is_success
    refused = order(live, "load", json={"wait": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "wait")
    assert order(live, "load", json={"a": "b" * 2000}).status_code == 413
    assert order(live, "load", content=b"x=1").status_code == 415

"""Loading and unloading by hand: who may, what it answers, and that no order of events leaves it stuck."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import MODEL, ONE_MODEL, LiveServer
from waiting import PATIENCE_S, eventually

from tokenmill.server.model import Model

Start = Callable[..., LiveServer]
ADMIN = {"authorization": "Bearer boss"}
CONFIG = 'models: {toy/echo: {source: "fake:step_s=0.005", max_context: 20000}}'


@pytest.fixture
def live(start: Start) -> LiveServer:
    """A preloaded model of 5 ms a token."""
    return start(CONFIG, admin_keys=("boss",))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """Models that were ordered to be loaded, each as the order begins to wait."""
    begun: list[Model] = []
    load = Model.load

    async def remember(model: Model) -> None:
        begun.append(model)
        await load(model)

    monkeypatch.setattr(Model, "load", remember)
    return begun


def order(server: LiveServer, what: str, name: str = MODEL, **options: Any) -> httpx.Response:
    """`POST /v1/models/{name}/load` or `/unload`."""
    return httpx.post(
        f"{server.url}/v1/models/{name}/{what}", **{"headers": ADMIN, "timeout": PATIENCE_S, **options}
    )


def status(server: LiveServer) -> str:
    return str(server.client.get("/health").json()["models"][MODEL])


def in_background(call: Callable[[], httpx.Response]) -> Future[httpx.Response]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def test_unload_and_load(live: LiveServer) -> None:
    before = live.canary()
    row = live.client.get(f"/v1/models/{MODEL}").json()
    pid = live.pid
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
    assert (live.pid, status(live)) == (None, "unloaded"), "a request must not load it"
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
    with live.paused():
        running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
        eventually(lambda: live.registry.unanswered == 1)
        unloading = in_background(lambda: order(live, "unload"))
        eventually(lambda: status(live) == "unloaded")
        assert live.complete(prompt="abc").status_code == 503
        assert not running.done()
        assert not unloading.done(), "it must not be over before the request is"
    assert unloading.result(PATIENCE_S).json()["status"] == "unloaded"
    assert running.result(PATIENCE_S).json()["choices"][0]["text"] == ("abc" * 34)[:100]


def test_lazy_model_is_loaded_again_by_a_request(start: Start) -> None:
    live = start('models: {toy/echo: {source: "fake:step_s=0.005", load: lazy}}', admin_keys=("boss",))
    assert order(live, "unload").json()["status"] == "unloaded", "nothing to do"
    before = live.canary()
    first = live.pid
    with live.paused():
        running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
        eventually(lambda: live.registry.unanswered == 1)
        unloading = in_background(lambda: order(live, "unload"))
        eventually(lambda: status(live) == "unloaded")
        assert live.client.get("/health").status_code == 200, "it is loaded when it is asked for"
        again = in_background(lambda: live.complete(prompt="abc", max_tokens=12, temperature=0))
        eventually(lambda: live.registry.unanswered == 2)
    assert again.result(PATIENCE_S).is_success, "this waits for the old process to go and the new one to come"
    assert live.canary() == before
    assert running.result(PATIENCE_S).is_success
    assert unloading.result(PATIENCE_S).is_success
    assert live.pid != first


def test_load_while_it_unloads_comes_after(live: LiveServer) -> None:
    before = live.canary()
    first = live.pid
    with live.paused():
        running = in_background(lambda: live.complete(prompt="abc", max_tokens=100, ignore_eos=True))
        eventually(lambda: live.registry.unanswered == 1)
        unloading = in_background(lambda: order(live, "unload"))
        eventually(lambda: status(live) == "unloaded")
        loading = in_background(lambda: order(live, "load"))
        eventually(lambda: status(live) == "loading")
    assert loading.result(PATIENCE_S).json()["status"] == "loaded"
    assert running.result(PATIENCE_S).is_success
    assert unloading.result(PATIENCE_S).is_success
    assert live.pid not in (None, first)
    assert live.canary() == before


def test_unload_while_it_loads(start: Start, tmp_path: Path, loads: list[Model]) -> None:
    """The process that is unloaded would load for ever."""
    live = start(ONE_MODEL, mode=f"hang_loading:{tmp_path / 'hung'}", admin_keys=("boss",))
    waiting = in_background(lambda: live.complete(prompt="abc"))
    loading = in_background(lambda: order(live, "load"))
    eventually((tmp_path / "hung").exists)
    eventually(lambda: live.registry.unanswered == 1 and loads == [live.model])
    assert order(live, "unload").json()["status"] == "unloaded"
    assert waiting.result(PATIENCE_S).json()["error"]["code"] == "model_unloaded"
    answer = loading.result(PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "model_unloaded")
    assert order(live, "load").is_success
    assert live.canary()


def test_unload_while_a_restart_is_due(live: LiveServer) -> None:
    live.canary()
    assert live.complete(prompt="CRASH").status_code == 503
    assert order(live, "unload").json()["status"] == "unloaded"
    time.sleep(1.5)
    assert (status(live), live.pid) == ("unloaded", None), "the restart must be off"
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
    pid = live.pid
    assert pid is not None
    unloading = in_background(lambda: order(live, "unload"))
    eventually(lambda: status(live) == "unloaded")
    os.kill(pid, signal.SIGKILL)
    assert running.result(PATIENCE_S).status_code == 503
    assert unloading.result(PATIENCE_S).json()["status"] == "unloaded"
    assert status(live) == "unloaded"


def test_hang_while_it_unloads(start: Start) -> None:
    live = start("server: {watchdog_s: 2}\n" + CONFIG, admin_keys=("boss",))
    with live.unwatched():
        live.canary()
        hanging = in_background(lambda: live.complete(prompt="HANG"))
        eventually(lambda: live.registry.unanswered == 1)
    assert order(live, "unload").json()["status"] == "unloaded"
    assert hanging.result(PATIENCE_S).status_code == 503


def test_load_says_why_it_failed(start: Start) -> None:
    live = start(ONE_MODEL, mode="load_failed", admin_keys=("boss",))
    for _ in range(2):
        answer = order(live, "load")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
        assert "truncated; download it again" in answer.json()["error"]["message"]
    assert order(live, "unload").json()["status"] == "unloaded"


def test_shutdown_ends_the_wait(start: Start, loads: list[Model]) -> None:
    live = start('models: {toy/echo: {source: "fake:load_s=600"}}', admin_keys=("boss",))
    loading = in_background(lambda: order(live, "load"))
    eventually(lambda: loads == [live.model])
    live._server.should_exit = True
    live._loop.call_soon_threadsafe(lambda: live._loop.create_task(live.registry.stop()))
    assert loading.result(PATIENCE_S).status_code == 503


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
        answers = {future.result(PATIENCE_S).status_code for future in futures}
    assert answers <= {200, 409, 503}, answers
    assert order(live, "load").json()["status"] == "loaded"
    assert live.canary() == before
    eventually(live.is_idle)
    assert order(live, "unload").is_success
    assert live.pid is None


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
    assert live.client.get(f"/v1/models/{MODEL}/load").status_code == 404
    assert order(live, "load", json={}).is_success
    refused = order(live, "load", json={"wait": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "wait")
    assert order(live, "load", json={"a": "b" * 2000}).status_code == 413
    assert order(live, "load", content=b"x=1").status_code == 415

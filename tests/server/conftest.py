"""Live servers over scripted engine processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_live import CHAT_ENGINE, CONFIG
from live_server import MODEL, ONE_MODEL, LiveServer
from served import CONFIG as SERVED
from served import Serve, Served
from waiting import eventually

from tokenmill.server.config_file import parse_config
from tokenmill.server.guard import Guard


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    """A server with one fast model, shared by the tests that don't break it."""
    with LiveServer(parse_config(ONE_MODEL)) as live:
        eventually(lambda: live.client.get("/health").json()["models"] == {MODEL: "loaded"})
        yield live


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[Guard]:
    """Those of all requests from now on: `live.call(guard.late)` makes a deadline pass when a test wants it."""
    entered: list[Guard] = []
    enter = Guard.__aenter__

    async def remember(guard: Guard) -> Guard:
        entered.append(guard)
        return await enter(guard)

    monkeypatch.setattr(Guard, "__aenter__", remember)
    return entered


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers of a test's own: `start(yaml_text, mode=…, keys=…, admin_keys=…)`."""
    running: list[LiveServer] = []

    def begin(
        text: str = ONE_MODEL,
        mode: str = "",
        keys: tuple[str, ...] = (),
        admin_keys: tuple[str, ...] = (),
    ) -> LiveServer:
        live = LiveServer(parse_config(text), mode, keys, admin_keys=admin_keys)
        running.append(live.__enter__())
        return live

    yield begin
    for live in running:
        live.__exit__()


@pytest.fixture(scope="session")
def chat_server() -> Iterator[LiveServer]:
    """A server with chat models of several kinds, shared by the tests that don't break it."""
    with LiveServer(parse_config(CONFIG), engine=CHAT_ENGINE) as live:
        eventually(lambda: live.client.get("/health").json()["status"] == "ok")
        yield live


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts servers in processes of their own: `serve(yaml_text, *options, …)`, as `Served` takes them."""
    running: list[Served] = []

    def begin(config: str = SERVED, *options: str, **others: str) -> Served:
        running.append(Served(tmp_path, config, *options, **others))
        return running[-1]

    yield begin
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()

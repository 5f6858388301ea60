"""Descriptors: the standard ones are open, connections don't take the last, and `/live` answers among thousands."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from served import CONFIG, Serve, Served
from waiting import PATIENCE_S, alive, eventually

from tokenmill.server.cli import listen
from tokenmill.server.descriptors import PROBES, SPARE

LIMIT = 128
LIMITED = f'ulimit -n {LIMIT}; exec "$@"'
GET = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
CLOSED = 'exec "$@" 0<&- 1>&- 2>&-'


def connect(served: Served) -> socket.socket:
    address = httpx.URL(served.url)
    assert address.port is not None
    return socket.create_connection((address.host, address.port), timeout=PATIENCE_S)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes; a server that closes with something unread resets."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def descriptors(pid: int) -> dict[int, str]:
    """Where each descriptor of a process leads."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found


def test_connections_leave_descriptors_for_all_else(serve: Serve) -> None:
    served = serve(shell=LIMITED)
    served.wait_ready()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(served)) for _ in range(2 * LIMIT)]
        assert b" 503 " in all_of(idle[-1]), "turned away without a word of its own"
        eventually(lambda: len(descriptors(served.process.pid)) <= LIMIT - SPARE - PROBES)
        for request, status in ((GET % b"/live", b"200"), (GET % b"/health", b"503"), (POST, b"503")):
            with connect(served) as connection:
                connection.sendall(request)
                answer = all_of(connection)
            assert answer.startswith(b"HTTP/1.1 " + status), answer
            assert b"connection: close" in answer
        assert b'"code":"too_many_connections"' in answer
        assert b"retry-after: 1" in answer
        (engine,) = served.engines()
        os.kill(engine, signal.SIGKILL)
        eventually(lambda: not alive(engine))
        eventually(lambda: served.log.count("ready after") == 2)
    eventually(lambda: served.ask("/health", "GET").status_code == 200)
    assert served.complete(json={"prompt": "abc", "max_tokens": 2}).status_code == 200
    assert served.log.count("no descriptors for more") == 1
    assert "Traceback" not in served.log


def test_the_limit_is_raised_to_what_is_allowed(serve: Serve) -> None:
    served = serve(shell='ulimit -S -n 64; exec "$@"')
    served.wait_ready()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_server_without_standard_descriptors_gets_some(serve: Serve) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    served = serve(CONFIG, "--port", str(port), shell=CLOSED)
    url = f"http://127.0.0.1:{port}"
    eventually(lambda: served.process.poll() is not None or is_up(url))
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "max_tokens": 2}, timeout=PATIENCE_S)
    assert answer.json()["choices"][0]["text"] == "ab"
    (engine,) = served.engines()
    for pid in (served.process.pid, engine):
        opened = descriptors(pid)
        assert {opened[number] for number in (0, 1, 2)} == {os.devnull}
    assert served.end(signal.SIGTERM) == 0


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/live").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("command", [["--version"], ["serve", "--port", "99999"], ["serve", "--nonsense"]])
def test_no_command_needs_standard_descriptors(command: list[str]) -> None:
    python = [sys.executable, "-m", "tokenmill.server.cli", *command]
    told = subprocess.run(python, capture_output=True, check=False).returncode
    assert subprocess.run(["sh", "-c", CLOSED, "sh", *python], check=False).returncode == told

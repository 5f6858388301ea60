"""`tokenmill serve` as a process: start, signals, orphans, and one-line refusals."""

from __future__ import annotations

import json
import pwd
import re
import signal
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import httpx
import pytest
from served import CONFIG, Serve
from waiting import PATIENCE_S, alive, eventually, paused

from tokenmill.engine.messages import LoadFailed, Loading, Ready, TokenizerInfo
from tokenmill.server.cli import StartError, _parser, main, make_config
from tokenmill.server.console import Console
from tokenmill.server.stop_signals import stop_signals
from tokenmill.server.version import VERSION

DEAF = """
import sys, time
class Deaf:
    def find_spec(self, name, path, target=None):
        if name == "uvloop":
            print("importing", file=sys.stderr)
            while True:
                try:
                    time.sleep(600)
                except BaseException:
                    pass
sys.meta_path.insert(0, Deaf())
"""
"""Importing what the server needs takes very long, and drops whatever exception is raised meanwhile."""


def stream_in_thread(url: str, tokens: int) -> tuple[threading.Thread, list[str]]:
    """A stream that is being read; its lines."""
    lines: list[str] = []

    def read() -> None:
        body = {"prompt": "abc", "stream": True, "max_tokens": tokens}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
            lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, lines


def test_a_user_without_an_entry_has_a_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert VERSION in capsys.readouterr().out
    assert Path.home() == Path("/")


def test_serves_and_tells_how(serve: Serve) -> None:
    served = serve()
    answer = served.complete(json={"prompt": "abc", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "ab"
    served.wait_ready()
    assert "toy/echo: weights" in served.log
    assert f"curl {served.url}/v1/completions" in served.log
    assert served.end(signal.SIGINT) == 0
    assert served.lines[-1] == "imported: []\n", "the front end serves without torch"


def test_interrupt_ends_everything_soon(serve: Serve) -> None:
    served = serve()
    served.wait_ready()
    thread, lines = stream_in_thread(served.url, 50_000)
    eventually(lambda: len(lines) > 2)
    (engine,) = served.engines()
    assert served.end(signal.SIGINT) == 0
    eventually(lambda: not alive(engine))
    thread.join(timeout=PATIENCE_S)
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["status_code"] == 503
    assert "Traceback" not in served.log


def test_interrupt_while_loading(serve: Serve) -> None:
    served = serve('models: {toy/echo: {source: "fake:load_s=600"}}')
    eventually(lambda: "weights" in served.log)
    (engine,) = served.engines()
    assert served.end(signal.SIGINT) == 0
    eventually(lambda: not alive(engine))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_start_that_is_called_off_ends_quietly(serve: Serve, number: signal.Signals) -> None:
    served = serve()
    eventually(lambda: "starting on" in served.log)
    (engine,) = served.engines()
    assert served.end(number) == 0
    eventually(lambda: not alive(engine))
    assert "Traceback" not in served.log


def test_a_start_is_called_off_whatever_it_is_doing(serve: Serve) -> None:
    """pydantic's core, for one, makes an error of its own of an exception that is raised while it works."""
    served = serve(before=DEAF)
    eventually(lambda: "importing" in served.log)
    (engine,) = served.engines()
    assert served.end(signal.SIGTERM) == 0
    eventually(lambda: not alive(engine))


def test_a_closed_terminal_ends_streams_with_an_error(serve: Serve) -> None:
    served = serve()
    served.wait_ready()
    thread, lines = stream_in_thread(served.url, 50_000)
    eventually(lambda: len(lines) > 2)
    assert served.end(signal.SIGHUP) == 0
    thread.join(timeout=PATIENCE_S)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["status_code"] == 503


def test_nohup_keeps_its_word() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_terminate_lets_running_requests_finish(serve: Serve) -> None:
    served = serve("server: {drain_s: 3600, watchdog_s: 3600}\n" + CONFIG)
    served.wait_ready()
    (engine,) = served.engines()
    with paused(engine):
        thread, lines = stream_in_thread(served.url, 150)
        eventually(lambda: 'tokenmill_requests_without_token{model="toy/echo"} 1' in served.metrics())
        served.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in served.log)
        refused = served.complete(json={"prompt": "abc"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
    thread.join(timeout=PATIENCE_S)
    assert lines[-1] == "data: [DONE]"
    assert served.wait() == 0


def test_terminate_gives_up_after_drain_s(serve: Serve) -> None:
    served = serve("server: {drain_s: 0.3}\n" + CONFIG)
    served.wait_ready()
    thread, lines = stream_in_thread(served.url, 50_000)
    eventually(lambda: len(lines) > 2)
    assert served.end(signal.SIGTERM) == 0
    thread.join(timeout=PATIENCE_S)
    assert "error" in json.loads(lines[-1].removeprefix("data: "))


def test_second_signal_stops_at_once(serve: Serve) -> None:
    served = serve("server: {drain_s: 3600}\n" + CONFIG)
    served.wait_ready()
    _, lines = stream_in_thread(served.url, 50_000)
    eventually(lambda: len(lines) > 2)
    (engine,) = served.engines()
    served.process.send_signal(signal.SIGTERM)
    eventually(lambda: "draining" in served.log)
    assert served.end(signal.SIGTERM) == 0
    eventually(lambda: not alive(engine))


def test_killed_front_end_leaves_no_orphan(serve: Serve) -> None:
    served = serve()
    served.wait_ready()
    (engine,) = served.engines()
    served.process.kill()
    served.process.wait()
    eventually(lambda: not alive(engine))


def test_nothing_of_prompts_and_keys_is_logged(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 36."""
    monkeypatch.setenv("TOKENMILL_API_KEYS", "sk-first-key, sk-second-key")
    served = serve()
    served.wait_ready()
    body = {"prompt": "my secret prompt", "max_tokens": 1, "user": "mr-user"}
    headers = {"authorization": "Bearer sk-second-key", "x-request-id": "a id\tof mine"}
    assert served.complete(json=body).status_code == 401
    assert served.complete(json=body, headers=headers).status_code == 200
    assert served.ask("/sk-first-key%0A2026 INFO forged", "GET", headers=headers).status_code == 404
    assert served.ask("/live", "GET").status_code == 200
    served.end(signal.SIGINT)
    assert "secret prompt" not in served.log
    assert "sk-" not in served.log
    assert "[redacted]" in served.log
    assert "mr-user" not in served.log
    assert not any(line.startswith("2026 INFO forged") for line in served.lines)
    assert "\\n2026 INFO forged" in served.log


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("models:\n  a/b: {sourc: x}\n", "served.yaml:2:9: a/b has no key 'sourc'; did you mean 'source'?"),
        ("models:\n\ta/b: {}\n", "served.yaml:2:1: "),
    ],
)
def test_bad_configuration_is_one_line(serve: Serve, config: str, message: str) -> None:
    """Row 38."""
    served = serve(config)
    assert served.wait() == 1
    assert len(served.lines) == 2
    assert message in served.lines[0]


@pytest.mark.parametrize(
    ("by_make", "way"),
    [(False, "choose another port with --port"), (True, "with --port (make serve PORT=…)")],
)
def test_taken_port_is_one_line(
    by_make: bool,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Row 39; `make serve` has a name of its own for the option."""
    monkeypatch.delenv("MAKELEVEL", raising=False)
    if by_make:
        monkeypatch.setenv("MAKELEVEL", "1")
    path = tmp_path / "m.yaml"
    path.write_text(CONFIG)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--config", str(path), "--port", port]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenmill: can't listen on 127.0.0.1:{port}: Address already in use")
    assert line.endswith(way)


def test_address_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    path = tmp_path / "m.yaml"
    path.write_text(CONFIG)
    assert main(["serve", "--config", str(path), "--host", "192.0.2.1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("choose another host with --host")
    assert main(["serve", "--config", str(tmp_path / "none.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"tokenmill: {tmp_path / 'none.yaml'}: can't be read: No such file or directory"


def options(**given: object) -> Namespace:
    names = ("config", "host", "port", "model", "name", "max_context", "device", "dtype", "quantization")
    names += ("tensor_parallel",)
    return Namespace(**{**dict.fromkeys(names), **given})


def test_configuration_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built_in = make_config(options())
    assert list(built_in.models) == ["huggingfacetb/smollm2-135m-instruct"]
    (tmp_path / "models.yaml").write_text(CONFIG)
    assert list(make_config(options()).models) == ["toy/echo"]
    changed = make_config(
        options(host="0.0.0.0", port=9, device="cpu", dtype="float32", quantization="int4", tensor_parallel=2)
    )
    assert (changed.server.host, changed.server.port) == ("0.0.0.0", 9)
    assert {(entry.device, entry.dtype) for entry in changed.models.values()} == {("cpu", "float32")}
    assert {(x.quantization, x.tensor_parallel) for x in changed.models.values()} == {("int4", 2)}
    assert {entry.max_context for entry in make_config(options(max_context=512)).models.values()} == {512}
    for source, name in (
        ("Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b"),
        ("./My Model.gguf", "local/my-model"),
        (str(tmp_path), f"local/{tmp_path.name.lower()}"),
    ):
        (model,) = make_config(options(model=source)).models
        assert model == name
    (model,) = make_config(options(model="x", name="a/b")).models
    assert model == "a/b"
    counts = ({"tensor_parallel": 0}, {"tensor_parallel": 65}, {"max_context": 0})
    for wrong in ({"name": "a/b"}, {"model": "x", "name": "ab"}, {"model": ""}, {"port": 70000}, *counts):
        with pytest.raises(StartError):
            make_config(options(**wrong))


def test_the_source_may_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`serve SOURCE` is `serve --model SOURCE`; both together are refused."""
    parse = _parser().parse_args
    assert parse(["serve", "a/b", "--port", "1"]) == parse(["serve", "--port", "1", "--model", "a/b"])
    assert parse(["serve"]).model is None
    with pytest.raises(SystemExit):
        parse(["serve", "a/b", "--model", "c/d"])
    assert "not allowed with argument SOURCE" in capsys.readouterr().err


def test_repository_configuration_is_the_built_in_one() -> None:
    path = Path(__file__).parents[2] / "models.yaml"
    assert make_config(options(config=path)).models == make_config(options(config=None)).models


READY = Ready(
    tokenizer=TokenizerInfo(tokenizer_json="", vocab_size=1),
    logits_width=1,
    max_context=64,
    block_size=16,
    num_blocks=4,
    max_batch=1,
    fingerprint="f",
    description="a toy",
)


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_line_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    console = Console("http://x", time.monotonic(), terminal)  # type: ignore[arg-type]
    for fraction in (0.0, 0.5):
        console.report("a/b", Loading("weights", fraction))
    console.report("a/b", LoadFailed("no"))
    assert terminal.text == "\r\x1b[Ka/b: weights   0%\r\x1b[Ka/b: weights  50%\r\x1b[K"
    with caplog.at_level("INFO"):
        console.report("a/b", READY)
        console.report("a/c", READY)
    assert caplog.text.count("curl ") == 1


def test_the_example_brings_a_key_where_one_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Console("http://x", time.monotonic(), Terminal(), with_key=True).report("a/b", READY)  # type: ignore[arg-type]
        Console("http://y", time.monotonic(), Terminal()).report("a/b", READY)  # type: ignore[arg-type]
    keyed, plain = re.findall("curl .*", caplog.text)
    assert "-H 'Authorization: Bearer KEY'" in keyed
    assert "Authorization" not in plain


def test_an_open_address_without_keys_is_said(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    warning = "no API key is asked for: whoever reaches http://0.0.0.0:"
    monkeypatch.delenv("TOKENMILL_API_KEYS", raising=False)
    served = serve(CONFIG, "--host", "0.0.0.0")
    served.wait_ready()
    assert warning in served.log
    monkeypatch.setenv("TOKENMILL_API_KEYS", "k")
    for address in (("--host", "0.0.0.0"), ("--host", "127.0.0.1")):
        served = serve(CONFIG, *address)
        served.wait_ready()
        assert warning not in served.log


@pytest.mark.parametrize("mode", ["load_failed", "crash_loading"])
def test_nothing_to_serve_is_an_end(serve: Serve, mode: str) -> None:
    """Whoever waits for the server learns that it won't come."""
    served = serve(mode=mode)
    assert served.process.wait(timeout=20) == 1
    eventually(lambda: "there is no model to serve: none could be loaded" in served.log)
    assert "Traceback" not in served.log


@pytest.mark.parametrize("on_demand", ["lazy", "admin"])
def test_what_may_be_loaded_later_is_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, on_demand: str
) -> None:
    if on_demand == "admin":
        monkeypatch.setenv("TOKENMILL_ADMIN_KEYS", "boss")
    config = 'models: {a/b: {source: "fake:"}, c/d: {source: "fake:", load: %s}}'
    served = serve(config % ("lazy" if on_demand == "lazy" else "preload"), mode="load_failed")
    eventually(lambda: "a/b: model.safetensors: truncated" in served.log)
    refused = httpx.post(f"{served.url}/v1/completions", json={"model": "c/d", "prompt": "a"}, timeout=30)
    assert refused.json()["error"]["code"] == "model_failed"
    assert httpx.get(f"{served.url}/health").status_code == 503
    assert served.end(signal.SIGTERM) == 0


def test_a_later_load_is_timed_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    console = Console("http://x", time.monotonic() - 1000, Terminal())  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        for _ in range(2):
            console.report("a/b", Loading("weights", None))
            console.report("a/b", READY)
    first, later = re.findall(r"ready after (\d+)", caplog.text)
    assert int(first) >= 1000
    assert int(later) < 1000


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokenmill {VERSION}\n"


def test_admin_keys_come_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOSS", "one, two")
    served = serve("server: {admin_keys_env: BOSS}\n" + CONFIG)
    served.wait_ready()
    path = "/v1/models/toy/echo/unload"
    assert served.ask(path).status_code == 401
    assert served.ask(path, headers={"x-api-key": "two"}).json()["status"] == "unloaded"
    assert served.end(signal.SIGTERM) == 0
    assert "two" not in served.log


def test_an_api_key_is_no_admin_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "served.yaml"
    path.write_text(CONFIG)
    monkeypatch.setenv("TOKENMILL_API_KEYS", "a,secret")
    monkeypatch.setenv("TOKENMILL_ADMIN_KEYS", "secret")
    assert main(["serve", "--config", str(path), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "TOKENMILL_API_KEYS and TOKENMILL_ADMIN_KEYS share a key" in error
    assert "secret" not in error

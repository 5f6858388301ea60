"""`tokenmill serve` as a process, over the scripted engine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from live_server import FAKE_ENGINE
from waiting import PATIENCE_S, eventually

RUN = """
import sys
from tokenmill.server.cli import main
code = main(sys.argv[2:], (sys.executable, *sys.argv[1].split()))
print("imported:", [name for name in ("torch", "transformers") if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
CONFIG = 'models: {toy/echo: {source: "fake:step_s=0.01", max_context: 100000}}'


class Served:
    """A `tokenmill serve` process over the scripted engine."""

    def __init__(
        self, folder: Path, config: str, *options: str, mode: str = "", before: str = "", shell: str = ""
    ) -> None:
        """`before`: Python that the process runs first. `shell`: what a shell does that becomes the process,
        ending in `exec "$@"`.
        """
        path = folder / "served.yaml"
        path.write_text(config)
        command = ["sh", "-c", shell, "sh"] if shell else []
        command += [sys.executable, "-c", before + RUN, f"{FAKE_ENGINE} --mode={mode}"]
        arguments = ["serve", "--config", str(path), "--port", "0", *options]
        hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under nohup
        try:
            self.process = subprocess.Popen(
                [*command, *arguments], stderr=subprocess.PIPE, text=True, cwd=folder
            )
        finally:
            signal.signal(signal.SIGHUP, hangup)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        eventually(lambda: "starting on" in self.log or self.process.poll() is not None)
        found = re.search(r"starting on (\S+)", self.log)
        assert found is not None, self.log
        return found.group(1)

    def wait_ready(self) -> None:
        eventually(lambda: "ready after" in self.log)

    def engines(self) -> list[int]:
        """Process ids of its engines, by their session's parent."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code, once all of the log is here."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once all of the log is here."""
        code = self.process.wait(timeout=PATIENCE_S)
        self._reader.join(timeout=PATIENCE_S)
        return code

    def ask(self, path: str, method: str = "POST", **options: Any) -> httpx.Response:
        """Any request."""
        return httpx.request(method, self.url + path, timeout=PATIENCE_S, **options)

    def metrics(self) -> str:
        """`GET /metrics`."""
        return self.ask("/metrics", "GET").text

    def complete(self, **options: Any) -> httpx.Response:
        """`POST /v1/completions`."""
        return self.ask("/v1/completions", **options)


Serve = Callable[..., Served]

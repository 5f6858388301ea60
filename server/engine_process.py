"""One engine process, spawned with its end of a socketpair. Needs no event loop: it comes before all else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from tokenmill.engine.messages import Start, StartSpeech, encode_frame

ENGINE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "tokenmill.engine.host")
SPEECH_COMMAND: tuple[str, ...] = (sys.executable, "-m", "tokenmill.engine.speech_host")


class EngineProcess:
    """A running engine process and the front end's end of its socket.

    It has a session of its own, so that a terminal's Ctrl-C reaches only the front end; it ends when the
    socket closes, however the front end came to its end.
    """

    def __init__(self, child: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._child = child
        self.connection = connection

    @classmethod
    def spawn(cls, start: Start | StartSpeech, command: Sequence[str]) -> EngineProcess:
        """Start a process and tell it what to load. Raises `OSError` where it can't be started."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                child = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                    start_new_session=True,
                )
            ours.sendall(encode_frame(start))
        except OSError:
            ours.close()
            raise
        ours.setblocking(False)
        return cls(child, ours)

    @property
    def pid(self) -> int:
        return self._child.pid

    def exit_reason(self) -> str | None:
        """How the process ended, in words; None while it runs."""
        code = self._child.poll()
        if code is None:
            return None
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def kill(self) -> None:
        """End it at once, with all that it may have started in its session."""
        if self._child.poll() is None:
            try:
                os.killpg(self._child.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._child.kill()

    def wait(self, timeout_s: float) -> bool:
        """Block until it has ended; False if it hasn't in this time."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def _has_descriptor(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True

"""Which signals ask the server to end."""

from __future__ import annotations

import signal


def stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM and, from a terminal that is closed, SIGHUP, unless `nohup` had it ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers

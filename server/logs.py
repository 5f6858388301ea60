"""Log lines of the front end: to stderr, one line a record, without keys, never with a prompt."""

from __future__ import annotations

import logging
import sys

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F)} | {ord("\n"): "\\n", ord("\r"): "\\r"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def escape(text: str) -> str:
    """A text on one line: nothing a client sends can make a second log line or move a terminal's cursor."""
    return text.translate(_ESCAPES)


class OneLineFormatter(logging.Formatter):
    """Time, level, message; control characters escaped and secrets replaced. Tracebacks keep their lines."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._secrets = secrets

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "[redacted]")
        return line


def configure(secrets: tuple[str, ...] = ()) -> None:
    """Send everything to stderr in one format. uvicorn's own lines are kept from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(secrets))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)

"""What `tokenmill serve` tells the person who started it: loading, ready, failed."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from tokenmill.engine.messages import LoadFailed, Loading, Ready

logger = logging.getLogger("tokenmill")


class Console:
    """A progress line that is rewritten on a terminal, one log line a stage elsewhere."""

    def __init__(
        self, url: str, begun: float, stream: TextIO | None = None, *, with_key: bool = False
    ) -> None:
        self._url = url
        self._with_key = with_key
        """Whether clients have to send one."""
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._begun = begun
        self._stages: dict[str, str] = {}
        self._loading_since: dict[str, float] = {}
        self._greeted = False

    def report(self, model: str, message: Loading | Ready | LoadFailed) -> None:
        """News of a model's loading."""
        match message:
            case Loading(stage=stage, fraction=fraction):
                self._loading(model, stage, fraction)
            case Ready():
                self._ready(model, message)
            case LoadFailed():
                self._end_line()

    def _loading(self, model: str, stage: str, fraction: float | None) -> None:
        # The first load began with the server; later ones (a restart, a lazy model) with their first news.
        self._loading_since.setdefault(model, time.monotonic() if self._greeted else self._begun)
        if self._terminal:
            share = "" if fraction is None else f" {fraction:4.0%}"
            self._stream.write(f"\r\x1b[K{model}: {stage}{share}")
            self._stream.flush()
        elif self._stages.get(model) != stage:
            logger.info("%s: %s", model, stage)
        self._stages[model] = stage

    def _ready(self, model: str, ready: Ready) -> None:
        self._end_line()
        elapsed = time.monotonic() - self._loading_since.pop(model, self._begun)
        logger.info(
            "%s: ready after %.1f s (%s, context %d)", model, elapsed, ready.description, ready.max_context
        )
        if not self._greeted:
            self._greeted = True
            key = " -H 'Authorization: Bearer KEY'" if self._with_key else ""
            body = f'{{"model": "{model}", "prompt": "The capital of France is"}}'
            logger.info("serving on %s (a playground; clients take %s/v1); try:", self._url, self._url)
            logger.info(
                "  curl %s/v1/completions%s -H 'Content-Type: application/json' -d '%s'", self._url, key, body
            )

    def _end_line(self) -> None:
        if self._terminal and self._stages:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

"""One engine under supervision: started, watched, restarted, unloaded when idle.

unloaded ──wanted──▶ loading ──Ready──▶ loaded ──idle──▶ unloaded
                        │ ▲               │
             LoadFailed │ └───back-off────┤ crash, hang
                        ▼                 ▼
                      failed (for good)   failed (until the restart)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.messages import FromEngine, LoadFailed, Loading, Ready, Stats
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.chat_format import ChatFormat
from tokenmill.server.config import FimMarkup
from tokenmill.server.engine_client import EngineClient
from tokenmill.server.engine_process import ENGINE_COMMAND, EngineProcess
from tokenmill.server.errors import ApiError, overloaded, unavailable
from tokenmill.server.fim import Fim, make_fim
from tokenmill.server.metrics import ModelMetrics

logger = logging.getLogger(__name__)

Status = Literal["unloaded", "loading", "loaded", "failed"]
Progress = Callable[[str, Loading | Ready | LoadFailed], None]

TICK_S = 1.0
FIRST_RESTART_S = 1.0
SLOWEST_RESTART_S = 60.0
STEADY_S = 60.0
"""An engine that served this long starts with a clean slate when it crashes."""
LOAD_ATTEMPTS = 3
"""Deaths while loading, one after the other, after which a model has failed for good."""
RETRY_LOADING_S = 5


class Engine:
    """A loaded engine: its socket, its tokenizer and what it said about itself."""

    def __init__(self, client: EngineClient, ready: Ready) -> None:
        self.client = client
        self.ready = ready
        self.tokenizer = Tokenizer(ready.tokenizer)
        self._fims: dict[FimMarkup | str | bool, Fim | None] = {}
        self._chats: dict[tuple[str | None, str], ChatFormat] = {}

    @property
    def context(self) -> int:
        """Tokens that one sequence may have: the model's limit, or all of the KV cache where that is less."""
        return min(self.ready.max_context, self.ready.num_blocks * self.ready.block_size)

    async def fim(self, wanted: FimMarkup | str | bool) -> Fim | None:
        """How the model fills in the middle, by an entry's `fim`; None where it can't."""
        if wanted not in self._fims:
            # The serialised tokenizer is megabytes of JSON.
            self._fims[wanted] = await asyncio.to_thread(make_fim, self.tokenizer, wanted)
        return self._fims[wanted]

    def chat(self, template: str | None, tool_parser: str) -> ChatFormat:
        """How the model chats, by an entry's `chat_template` (None: its own) and `tool_parser`. `ApiError`
        400 where it has no template."""
        wanted = (template, tool_parser)
        if wanted not in self._chats:
            self._chats[wanted] = ChatFormat(self.tokenizer, template, tool_parser)
        return self._chats[wanted]


class Place:
    """One request's place: in the queue until its first token, in the batch until it is released."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._waiting = True
        self._held = True
        model.queued += 1

    def start(self) -> None:
        """The first token is there."""
        if self._waiting and self._held:
            self._waiting = False
            self._model.queued -= 1
            self._model.started += 1

    def release(self) -> None:
        """The request has ended. May be called twice."""
        if self._held:
            self._held = False
            if self._waiting:
                self._model.queued -= 1
            else:
                self._model.started -= 1


class Model:
    """Keeps one engine as it should be, and lets requests in when it is."""

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        *,
        lazy: bool = False,
        idle_unload_s: float = 0.0,
        watchdog_s: float = 30.0,
        load_wait_s: float = 120.0,
        max_queue: int = 256,
        command: Sequence[str] = ENGINE_COMMAND,
        process: EngineProcess | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.status: Status = "unloaded" if lazy else "loading"
        self.reason: str | None = None
        self.engine: Engine | None = None
        self.stats: Stats | None = None
        self.metrics = ModelMetrics()
        self.queued = 0
        """Admitted requests that have no token yet."""
        self.started = 0
        """Requests that have a token and aren't finished."""
        self._idle_unload_s = idle_unload_s
        self._watchdog_s = watchdog_s
        self._load_wait_s = load_wait_s
        self._max_queue = max_queue
        self._command = command
        self._process = process
        self._progress = progress
        self._client: EngineClient | None = None
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._lost = asyncio.Event()
        self._silent_s = 0.0
        self._idle_s = 0.0
        self._retry_after_s: int | None = None
        self._load_error: str | None = None
        self._served = False
        self._crashed = False
        self._unloading = False
        if not lazy:
            self._wanted.set()

    @property
    def serves(self) -> bool:
        """Whether a request would be taken on: loaded and alive, or to be loaded when asked for."""
        return self.status in ("loaded", "unloaded")

    # Requests

    def admit(self) -> Place:
        """A place in the queue; 429 when everything that the batch can't take yet fills it already."""
        places = max(0, self.config.max_batch - self.started)
        if self.queued - places >= self._max_queue:
            raise overloaded(f"{self.name} has {self.queued} requests waiting, which is all it takes on", 1)
        return Place(self)

    async def acquire(self) -> Engine:
        """The loaded engine. Waits for one that is loading, up to `load_wait_s`. Raises `ApiError` (503)."""
        if self.status == "unloaded":
            self._set("loading")
            self._wanted.set()
        self._idle_s = 0.0
        if self.status == "loading" and not self._crashed and self._load_wait_s > 0:
            try:
                async with asyncio.timeout(self._load_wait_s):
                    while self.status == "loading":
                        await self._changed.wait()
            except TimeoutError:
                raise self._unavailable() from None
        if self.engine is None:
            raise self._unavailable()
        return self.engine

    def _unavailable(self) -> ApiError:
        if self.status == "loading":
            return unavailable(f"{self.name} is loading", "model_loading", RETRY_LOADING_S)
        if self._retry_after_s is None:
            return unavailable(
                f"{self.name} could not be loaded; GET /v1/models says why", "model_failed", None
            )
        return unavailable(f"{self.name} is down and will be restarted", "engine_down", self._retry_after_s)

    # Supervision

    async def supervise(self) -> None:
        """Run until cancelled: load when wanted, restart after a crash, unload when idle."""
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while True:
                await self._wanted.wait()
                self._set("loading")
                begun = loop.time()
                ending = await self._run_once()
                if ending is None:
                    failures = 0
                    continue
                failures = 1 if loop.time() - begun > STEADY_S else failures + 1
                if not self._served and (self._load_error is not None or failures >= LOAD_ATTEMPTS):
                    self._wanted.clear()
                    self._fail(ending)
                    continue
                delay = min(SLOWEST_RESTART_S, FIRST_RESTART_S * 2 ** (failures - 1))
                self._crashed = True
                self._fail(f"{ending}; restart in {delay:g} s", int(delay) + 1)
                await asyncio.sleep(delay)
        finally:
            if self._client is not None:
                self._client.close("the server is shutting down")
            if self._process is not None:
                await self._reap(self._process)

    async def _run_once(self) -> str | None:
        """One engine process from start to end; why it ended, or None when it was unloaded on purpose."""
        self._lost.clear()
        self._silent_s = self._idle_s = 0.0
        self._unloading = False
        self._load_error = ending = None
        try:
            self._process = process = self._process or EngineProcess.spawn(self.config, self._command)
        except OSError as error:
            return f"the engine process can't be started: {error}"
        self._client = client = EngineClient(self)
        await client.connect(process.connection)
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(TICK_S):
                    await self._lost.wait()
            except TimeoutError:
                ending = self._hang()
                if ending is not None or self._unload_idle():
                    client.close()
        self._client = None
        reason = await self._reap(process)
        self._process = None
        return None if self._unloading else ending or self._load_error or reason

    def _hang(self) -> str | None:
        """Once a tick: why the engine counts as hung, if it does.

        Ticks are counted, not clocks read: a machine that slept doesn't look like a hang.
        """
        if self.status != "loaded":
            return None
        self._silent_s += TICK_S
        return (
            f"the engine was silent for {self._silent_s:g} s" if self._silent_s >= self._watchdog_s else None
        )

    def _unload_idle(self) -> bool:
        """Once a tick: whether the engine has idled for long enough to go."""
        if self.status != "loaded" or not self._idle_unload_s:
            return False
        self._idle_s = 0.0 if self.queued or self.started else self._idle_s + TICK_S
        if self._idle_s < self._idle_unload_s:
            return False
        logger.info("%s: unloaded after %g s without requests", self.name, self._idle_s)
        self._unloading = True
        self._wanted.clear()
        self.engine = None
        self._set("unloaded")
        return True

    async def _reap(self, process: EngineProcess) -> str:
        """Collect the process's end; it is killed where it doesn't come to it by itself."""
        for _ in range(50):
            if (reason := process.exit_reason()) is not None:
                return f"the engine process {reason}"
            await asyncio.sleep(0.02)
        process.kill()
        process.wait(1.0)
        return "the engine process hung and was killed"

    def on_message(self, message: FromEngine) -> None:
        self._silent_s = 0.0
        match message:
            case Stats():
                self.stats = message
            case Ready():
                self._on_ready(message)
            case LoadFailed():
                self._on_load_failed(message)
            case Loading():
                self._report(message)

    def on_lost(self, reason: str) -> None:
        self.engine = None
        self.stats = None
        if self.status == "loaded":
            # `supervise` will know more; until it wakes, requests must not think that the model serves.
            self.reason, self._retry_after_s = reason, int(FIRST_RESTART_S)
            self._set("failed")
        self._lost.set()

    def _on_ready(self, ready: Ready) -> None:
        assert self._client is not None
        try:
            self.engine = Engine(self._client, ready)
        except ValueError as error:
            self._on_load_failed(LoadFailed(str(error)))
            self._client.close()
            return
        self._served = True
        self._crashed = False
        self._set("loaded")
        self._report(ready)

    def _on_load_failed(self, message: LoadFailed) -> None:
        self._load_error = message.reason
        self._report(message)

    def _report(self, message: Loading | Ready | LoadFailed) -> None:
        if self._progress is not None:
            self._progress(self.name, message)

    def _fail(self, reason: str, retry_after_s: int | None = None) -> None:
        logger.error("%s: %s", self.name, reason)
        self.reason, self._retry_after_s = reason, retry_after_s
        self._set("failed")

    def _set(self, status: Status) -> None:
        self.status = status
        if status != "failed":
            self.reason = None
        # Wakes all that wait now; who comes later waits for the next change.
        self._changed.set()
        self._changed.clear()

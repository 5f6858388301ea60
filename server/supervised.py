"""A process of its own under supervision: started, watched, restarted, unloaded when idle or by hand.

unloaded ──wanted──▶ loading ──ready──▶ loaded ──idle, by hand──▶ unloaded
                        │ ▲               │
             LoadFailed │ └───back-off────┤ crash, hang (while loading, too)
                        ▼                 ▼
                      failed (for good)   failed (until the restart)

`supervise` alone starts and ends processes; all others change what is wanted (`_ask`, `_leave`) and wake it.
So whatever comes between, the last word holds: a process that has been told to leave finishes its requests and
goes, and when somebody has asked for the model meanwhile, a new one is loaded after it. What is loaded, and how one
speaks with it, is the subclass's: `model.py`, `voice.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from tokenmill.engine.messages import Alive, LoadFailed
from tokenmill.server.engine_process import EngineProcess
from tokenmill.server.errors import ApiError, overloaded, unavailable
from tokenmill.server.place import Held, Place

logger = logging.getLogger(__name__)

Status = Literal["unloaded", "loading", "loaded", "failed"]

TICK_S = 1.0
FIRST_RESTART_S = 1.0
SLOWEST_RESTART_S = 60.0
STEADY_S = 60.0
"""A process that served this long starts with a clean slate when it crashes."""
LOAD_ATTEMPTS = 3
"""Deaths or hangs while loading, one after the other, after which a model has failed for good."""
RETRY_LOADING_S = 5


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a process is kept."""

    lazy: bool = False
    """Loaded when it is asked for, not at the start."""
    idle_unload_s: float = 0.0
    """Unloaded after so long without requests; 0: never."""
    watchdog_s: float = 30.0
    """Silence after which it counts as hung."""
    load_silence_s: float = 60.0
    """The same while it loads."""
    load_watchdog_s: float = 900.0
    """How long it may load without progress, though it says that it lives."""
    load_wait_s: float = 120.0
    """How long a request waits for it to load."""
    max_queue: int = 256


class Client(Protocol):
    """The front end's end of a process's socket."""

    async def connect(self, connection: socket.socket) -> None: ...

    def close(self, reason: str = ...) -> None: ...


E = TypeVar("E", bound=Held)
C = TypeVar("C", bound="Client")


class Supervised(ABC, Generic[C, E]):
    """Keeps one process as it should be, and lets requests in when it is.

    `C` is the client that speaks with it, `E` what it has loaded.
    """

    def __init__(
        self,
        name: str,
        rules: Rules,
        batch: int,
        process: EngineProcess | None = None,
    ) -> None:
        self.name = name
        self.status: Status = "unloaded" if rules.lazy else "loading"
        self.reason: str | None = None
        self.queued = 0
        """Admitted requests that nothing came of yet."""
        self.started = 0
        """Requests that something came of and that aren't finished."""
        self._batch = batch
        """Requests that are worked on together."""
        self._rules = rules
        self._process = process
        self._client: C | None = None
        self._engine: E | None = None
        """What the present process became when it was ready; serves while the status is `loaded`."""
        self._wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._stir = asyncio.Event()
        """Wakes `supervise` before its time."""
        self._lost = False
        self._failures = 0
        self._silent_s = 0.0
        self._stuck_s = 0.0
        """As `_silent_s`, but without regard to bare signs of life."""
        self._idle_s = 0.0
        self._retry_after_s: int | None = None
        self._load_error: str | None = None
        self._ready_at: float | None = None
        """When the present process, or the last one, began to serve, by the loop's clock."""
        self._served = False
        self._crashed = False
        self._leaving = False
        """Whether the present process is to end as soon as its requests have."""
        self._by_hand = False
        """Whether only `load` brings the model back."""
        if not rules.lazy:
            self._wanted.set()

    @property
    def engine(self) -> E | None:
        """What takes requests; None while there is none."""
        return self._engine if self.status == "loaded" else None

    @property
    def serves(self) -> bool:
        """Whether a request would be taken on: loaded and alive, or to be loaded when asked for."""
        return self.status == "loaded" or (self.status == "unloaded" and not self._by_hand)

    # Requests

    def admit(self) -> Place:
        """A place in the queue; 429 when everything that the batch can't take yet fills it already."""
        places = max(0, self._batch - self.started)
        if self.queued - places >= self._rules.max_queue:
            raise overloaded(f"{self.name} has {self.queued} requests waiting, which is all it takes on", 1)
        return Place(self)

    async def acquire(self, place: Place | None = None) -> E:
        """What is loaded. Waits for one that is loading, up to `load_wait_s`. Raises `ApiError` (503).

        It may be ended at any time, but not before a `place` that is given with it is released.
        """
        if self.status == "unloaded" and not self._by_hand:
            self._ask()
        self._idle_s = 0.0
        if self.status == "loading" and not self._crashed and self._rules.load_wait_s > 0:
            try:
                async with asyncio.timeout(self._rules.load_wait_s):
                    while self.status == "loading":
                        await self._changed.wait()
            except TimeoutError:
                raise self._unavailable() from None
        engine = self.engine
        if engine is None:
            raise self._unavailable()
        if place is not None:
            place.enter(engine)
        return engine

    def on_release(self) -> None:
        """A place that held an engine is free."""
        if self._leaving:
            self._stir.set()

    def _unavailable(self) -> ApiError:
        if self.status == "loading":
            return unavailable(f"{self.name} is loading", "model_loading", RETRY_LOADING_S)
        if self.status == "unloaded":
            # A lazy one, unloaded while this request waited for it, loads again when it is asked again.
            after = f"; POST /v1/models/{self.name}/load brings it back" if self._by_hand else ""
            return unavailable(
                f"{self.name} was unloaded{after}", "model_unloaded", None if self._by_hand else 1
            )
        if self._retry_after_s is None:
            return unavailable(
                f"{self.name} could not be loaded; GET /v1/models says why", "model_failed", None
            )
        return unavailable(f"{self.name} is down and will be restarted", "engine_down", self._retry_after_s)

    # Orders

    async def load(self) -> None:
        """Load the model unless it is, and wait for the outcome; a restart that is due comes at once.

        Raises `ApiError`: 503 where it can't be loaded, 409 where it was unloaded meanwhile.
        """
        self._by_hand = False
        self._idle_s = 0.0
        if self.status in ("unloaded", "failed"):
            # The first failure is reported to who gave the order; a broken file isn't tried again.
            self._served = self._crashed = False
            self._failures = 0
            self._ask()
        while self.status == "loading":
            await self._changed.wait()
        if self.status == "failed":
            message = f"{self.name} could not be loaded: {self.reason}"
            raise unavailable(message, "model_failed", self._retry_after_s)
        if self.status == "unloaded":
            message = f"{self.name} was unloaded before it was ready"
            raise ApiError(409, message, kind="conflict_error", code="model_unloaded")

    async def unload(self) -> None:
        """Unload the model, and wait until its engine process has finished its requests and ended.

        A lazy model is loaded again when a request asks for it, any other when `load` does.
        """
        process = self._process
        self._by_hand = not self._rules.lazy
        if self.status != "unloaded":
            logger.info("%s: to be unloaded, as it was asked for", self.name)
            self._leave()
        while process is not None and self._process is process:
            await self._changed.wait()

    async def given_up(self) -> None:
        """Wait until it has failed for good; one that only waits for its restart hasn't."""
        while self.status != "failed" or self._retry_after_s is not None:
            await self._changed.wait()

    def prepare(self) -> None:
        """Begin to load a lazy one before a request asks for it."""
        if self.status == "unloaded":
            self._ask()

    def _ask(self) -> None:
        """Want an engine."""
        self._set("loading")
        self._wanted.set()
        self._stir.set()

    def _leave(self) -> None:
        """Want none: the present one takes no more requests and goes after its last."""
        self._leaving = True
        self._crashed = False
        self._wanted.clear()
        self._set("unloaded")
        self._stir.set()

    # Supervision

    async def supervise(self) -> None:
        """Run until cancelled: load when wanted, restart after a crash, unload when idle."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._wanted.is_set():
                    await self._wanted.wait()
                self._set("loading")
                ending = await self._run_once()
                if ending is None:
                    self._failures = 0
                    continue
                steady = self._ready_at is not None and loop.time() - self._ready_at > STEADY_S
                self._failures = 1 if steady else self._failures + 1
                if not self._served and (self._load_error is not None or self._failures >= LOAD_ATTEMPTS):
                    self._wanted.clear()
                    self._fail(ending)
                    continue
                delay = min(SLOWEST_RESTART_S, FIRST_RESTART_S * 2 ** (self._failures - 1))
                self._crashed = True
                self._fail(f"{ending}; restart in {delay:g} s", int(delay) + 1)
                await self._stirred(delay)
        finally:
            await self._end()

    async def _end(self) -> None:
        """End the process, and let nobody wait for a model that won't come."""
        self._wanted.clear()
        if self._client is not None:
            self._client.close("the server is shutting down")
        if self._process is not None:
            await self._reap(self._process)
            self._process = None
        self.reason, self._retry_after_s = "the server is shutting down", 1
        self._set("failed")

    async def _stirred(self, seconds: float) -> bool:
        """Wait to be woken, for so long at most; whether that happened."""
        try:
            async with asyncio.timeout(seconds):
                await self._stir.wait()
        except TimeoutError:
            return False
        finally:
            self._stir.clear()
        return True

    async def _run_once(self) -> str | None:
        """One engine process from start to end; why it ended, or None when it was unloaded on purpose."""
        self._lost = self._leaving = False
        self._silent_s = self._stuck_s = self._idle_s = 0.0
        self._engine = self._load_error = self._ready_at = ending = None
        self._stir.clear()
        try:
            self._process = process = self._process or self._spawn()
        except OSError as error:
            return f"the engine process can't be started: {error}"
        self._client = client = self._new_client()
        await client.connect(process.connection)
        while not self._lost:
            if self._leaving and (self._engine is None or not self._engine.requests):
                client.close()
            if not await self._stirred(TICK_S):
                ending = self._hang()
                if ending is not None:
                    client.close()
                self._unload_idle()
        self._client = None
        # From here on only an order wakes: it spares the pause before a restart.
        self._stir.clear()
        reason = await self._reap(process)
        self._process = None
        self._changed.set()
        self._changed.clear()
        return None if self._leaving else ending or self._load_error or reason

    def _hang(self) -> str | None:
        """Once a tick: why the engine counts as hung, if it does.

        Ticks are counted, not clocks read: a machine that slept doesn't look like a hang.
        """
        self._silent_s += TICK_S
        self._stuck_s += TICK_S
        rules = self._rules
        if self._engine is not None:
            silent = self._silent_s >= rules.watchdog_s
            return f"the engine was silent for {self._silent_s:g} s" if silent else None
        if self._silent_s >= rules.load_silence_s:
            return f"the engine was silent for {self._silent_s:g} s while loading"
        if self._stuck_s >= rules.load_watchdog_s:
            return f"the engine made no progress for {self._stuck_s:g} s while loading"
        return None

    def _unload_idle(self) -> None:
        """Once a tick: tell the engine to leave when it has idled for long enough."""
        if self.status != "loaded" or not self._rules.idle_unload_s:
            return
        self._idle_s = 0.0 if self.queued or self.started else self._idle_s + TICK_S
        if self._idle_s >= self._rules.idle_unload_s:
            logger.info("%s: unloaded after %g s without requests", self.name, self._idle_s)
            self._leave()

    async def _reap(self, process: EngineProcess) -> str:
        """Collect the process's end; it is killed where it doesn't come to it by itself."""
        for _ in range(50):
            if (reason := process.exit_reason()) is not None:
                return f"the engine process {reason}"
            await asyncio.sleep(0.02)
        process.kill()
        process.wait(1.0)
        return "the engine process hung and was killed"

    @abstractmethod
    def _spawn(self) -> EngineProcess:
        """Start the process. Raises `OSError`."""

    @abstractmethod
    def _new_client(self) -> C:
        """What will speak with it. It tells this object what it hears, by `_on_sign_of_life` and the like."""

    def _on_sign_of_life(self, message: msgspec.Struct) -> None:
        self._silent_s = 0.0
        if not isinstance(message, Alive):
            self._stuck_s = 0.0

    def on_lost(self, reason: str) -> None:
        """The socket is closed."""
        if self.status == "loaded":
            # `supervise` will know more; until it wakes, requests must not think that the model serves.
            self.reason, self._retry_after_s = reason, int(FIRST_RESTART_S)
            self._set("failed")
        self._lost = True
        self._stir.set()

    def _on_ready(self, engine: E) -> None:
        """The process has loaded what it serves."""
        self._engine = engine
        self._ready_at = asyncio.get_running_loop().time()
        self._served = True
        self._crashed = False
        self._set("loaded")

    def _on_load_failed(self, message: LoadFailed) -> None:
        self._load_error = message.reason

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

"""Names to models: entries, deployments and aliases of `models.yaml`, and the life of their engines."""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from tokenmill.server.config import Config, Entry
from tokenmill.server.engine_process import ENGINE_COMMAND, SPEECH_COMMAND, EngineProcess
from tokenmill.server.errors import ApiError, bad_request, draining, shorten
from tokenmill.server.metrics import Snapshot
from tokenmill.server.model import Model, Progress
from tokenmill.server.plan import Variant, make_plan
from tokenmill.server.supervised import Rules, Status
from tokenmill.server.voice import Voice

logger = logging.getLogger(__name__)


class Registry:
    """All models of a running server. Made inside the event loop."""

    def __init__(
        self,
        config: Config,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        speech_command: Sequence[str] = SPEECH_COMMAND,
        processes: Mapping[str, EngineProcess] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.plan = make_plan(config)
        self.created = int(time.time())
        self.draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._voices = {
            name: Voice(name, speech, _rules(self.plan.entries[name], config), speech_command)
            for name, speech in self.plan.voices.items()
        }
        self._models = {
            name: Model(
                name,
                engine,
                _rules(self.plan.entries[name], config),
                command=command,
                process=(processes or {}).get(name),
                progress=progress,
                voice=self._voices.get(self.plan.variants[name].root),
            )
            for name, engine in self.plan.engines.items()
        }

    def start(self) -> None:
        """Begin to supervise every model and voice."""
        supervised: list[Model | Voice] = [*self._models.values(), *self._voices.values()]
        for kept in supervised:
            task = asyncio.get_running_loop().create_task(kept.supervise(), name=f"supervise {kept.name}")
            task.add_done_callback(_log_failure)
            self._tasks.append(task)

    async def stop(self) -> None:
        """End every process at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hopeless(self) -> None:
        """Wait until every model has failed for good."""
        await asyncio.gather(*(model.given_up() for model in self))

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def variants(self) -> Iterator[Variant]:
        """Entries and deployments, in the order of the file."""
        return iter(self.plan.variants.values())

    def resolve(self, name: str | None) -> tuple[Variant, Model]:
        """The variant that a request's `model` names. Raises `ApiError`: 404, or 503 while draining."""
        if self.draining:
            raise draining()
        if name is None:
            if len({variant.root for variant in self.plan.variants.values()}) > 1:
                raise bad_request(f"model: say which one: {', '.join(self.plan.variants)}", "model")
            name = next(iter(self.plan.variants))
        return self.find(name)

    def find(self, name: str) -> tuple[Variant, Model]:
        """The variant of a name or alias. Raises `ApiError` 404 with close matches."""
        variant = self.plan.variants.get(self.plan.aliases.get(name, name))
        if variant is None:
            known = [*self.plan.variants, *self.plan.aliases]
            close = {
                match.lower()
                for match in difflib.get_close_matches(name.lower(), map(str.lower, known), 3, 0.5)
            }
            options = [candidate for candidate in known if candidate.lower() in close] or list(
                self.plan.variants
            )[:5]
            message = f"the model {shorten(name)} doesn't exist here; did you mean {' or '.join(options)}?"
            raise ApiError(404, message, param="model", code="model_not_found")
        return variant, self._models[variant.engine]

    def describe(self, variant: Variant) -> dict[str, object]:
        """A row of `GET /v1/models`."""
        model = self._models[variant.engine]
        row: dict[str, object] = {
            "id": variant.name,
            "object": "model",
            "created": self.created,
            "owned_by": variant.root.split("/")[0],
            "root": variant.root,
            "max_model_len": model.engine.context if model.engine is not None else None,
            "status": model.status,
        }
        if model.reason is not None:
            row["reason"] = model.reason
        if model.voice is not None:
            row["speech"] = model.voice.describe()
        return row

    def health(self) -> tuple[bool, dict[str, Status]]:
        """Whether at least one model serves, and the status of each."""
        serves = not self.draining and any(model.serves for model in self)
        return serves, {kept.name: kept.status for kept in (*self, *self._voices.values())}

    def snapshots(self) -> Iterator[Snapshot]:
        """What `/metrics` shows."""
        for model in self:
            yield Snapshot(model.name, model.status == "loaded", model.queued, model.stats, model.metrics)

    @property
    def unanswered(self) -> int:
        """Requests that are admitted and not finished."""
        return sum(model.queued + model.started for model in self)


def _rules(entry: Entry, config: Config) -> Rules:
    """How an entry's processes are kept."""
    idle = entry.idle_unload_s
    return Rules(
        lazy=entry.load == "lazy",
        idle_unload_s=config.defaults.idle_unload_s if idle is None else idle,
        watchdog_s=config.server.watchdog_s,
        load_silence_s=config.server.load_silence_s,
        load_watchdog_s=config.server.load_watchdog_s,
        load_wait_s=config.server.load_wait_s,
        max_queue=config.server.max_queue,
    )


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)

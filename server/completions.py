"""`POST /v1/completions`: from the body to the last byte of the answer, streamed or whole."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from tokenmill.server.admission import Job, cache_salt, check_limits, make_job
from tokenmill.server.answer import Answer
from tokenmill.server.body import read_body
from tokenmill.server.context import RequestContext
from tokenmill.server.errors import ApiError, ClientGone, internal_error, timed_out
from tokenmill.server.generation import Choice, Generation
from tokenmill.server.guard import Guard
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.model import Model
from tokenmill.server.parse import first_of, name_of
from tokenmill.server.plan import Variant
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.registry import Registry
from tokenmill.server.rerank import rank_by_suffix
from tokenmill.server.responses import send_json
from tokenmill.server.speech import Speech, check_voice, open_speech
from tokenmill.server.spoken_answer import EventWriter, SpokenEvents, spoken_whole

logger = logging.getLogger(__name__)

FAREWELL_S = 1.0
"""How long the error event of a stream may wait for a client that doesn't read."""

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EndpointOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a completions route behaves."""

    max_body: int
    """Bytes."""
    warn_unknown: bool = False
    """Log unknown parameters instead of refusing them."""
    salt_rule: str = "none"
    gateway: bool = False
    """The shape of `/v4/beta/completions`: streams end without [DONE], error events carry `choices`."""


class GeneratingEndpoint(ABC):
    """The handler of a route that generates; what its body means is the subclass's."""

    id_prefix = ""
    """What its answers' ids begin with, before what all have."""

    def __init__(self, registry: Registry, options: EndpointOptions) -> None:
        self._registry = registry
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `ApiError` or `ClientGone` while the answer hasn't begun."""
        context: RequestContext = scope["state"]["context"]
        context.name = self.id_prefix + context.name
        request, exchange = self._read(await read_body(scope, receive, self._options.max_body))
        context.add_headers(first_of(request, "inference_extra_headers") or {})
        context.user = request.user
        variant, model = self._registry.resolve(request.model)
        context.model = variant.name
        status = 500
        try:
            asked = Asked(
                options=self._options, request=request, variant=variant, model=model, context=context
            )
            await exchange(asked).run(receive, send)
            status = 200
            model.metrics.request.observe(time.monotonic() - context.arrival)
        except ApiError as error:
            status = error.status
            if not context.answering:
                raise
        except ClientGone:
            status = 499
            raise
        finally:
            context.outcome = status
            model.metrics.outcomes[str(status)] += 1

    @abstractmethod
    def _read(self, body: bytes) -> tuple[CompletionRequest, MakeExchange]:
        """The checked request of a body, and what answers it. Raises `ApiError` 400."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request, whom it is for, and how its route answers."""

    options: EndpointOptions
    request: CompletionRequest
    variant: Variant
    model: Model
    context: RequestContext


class Exchange:
    """One request to one model, and its answer."""

    def __init__(self, asked: Asked) -> None:
        self._options = asked.options
        self._request = asked.request
        self._variant = asked.variant
        self._model = asked.model
        self._context = asked.context
        self._name = asked.request.model or asked.variant.name
        """The model's, as it was asked for."""

    async def run(self, receive: Receive, send: Send) -> None:
        """Generate and answer. Errors are raised; a stream that has begun also ends with the error event."""
        check_limits(self._request, self._variant)
        check_voice(self._request, self._variant.name, self._model.voice)
        stream = Stream(send, self._context)
        timeout_s = first_of(self._request, "inference_timeout") or self._variant.timeout_s
        late = timed_out(timeout_s, name_of(self._request, "inference_timeout"))
        try:
            async with Guard(receive, self._context.arrival + timeout_s, late) as guard:
                whole = await self._generate(guard, stream)
        except ApiError as error:
            await stream.fail(error, self._options.gateway)
            raise
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s failed", self._context.name)
            failure = internal_error(self._context.name)
            await stream.fail(failure, self._options.gateway)
            raise failure from None
        if whole is not None:
            await send_json(send, 200, whole, self._context.response_headers())

    async def _generate(self, guard: Guard, stream: Stream) -> bytes | None:
        """The body of the answer, or None when it was streamed."""
        request, context, model = self._request, self._context, self._model
        place = model.admit()
        speech: Speech | None = None
        try:
            engine = await model.acquire(place)
            speech = await open_speech(request, self._variant.name, model.voice)
            salt = cache_salt(self._options.salt_rule, context.api_key, request.user)
            job = await self._job(engine, salt)
            # What is ranked at the end can't be streamed as it comes.
            live = request.stream and job.suffix is None
            generation = Generation(context, engine, job, guard, place, model.metrics, live)
            answer = self._answer(generation)
            if speech is not None:
                speech.join(generation)
            try:
                generation.start()
                if request.stream:
                    await self._stream(generation, answer, stream, speech)
                    return None
                await generation.finished()
                await rank_by_suffix(generation)
                whole = answer.whole()
                return whole if speech is None else await spoken_whole(whole, speech, generation)
            finally:
                generation.close()
                context.usage = generation.usage()
        finally:
            if speech is not None:
                speech.close()
            place.release()

    async def _stream(
        self, generation: Generation, answer: Writer, stream: Stream, speech: Speech | None
    ) -> None:
        """Send the answer as events, live or, where the best is known at the end only, then."""
        events: EventWriter = answer if speech is None else SpokenEvents(answer, speech)
        ready: list[Choice] = []
        if not generation.streams:
            await generation.finished()
            await rank_by_suffix(generation)
            ready = generation.returned()
        await stream.run(generation, events, ready, with_done=not self._options.gateway)

    async def _job(self, engine: Engine, salt: str) -> Job:
        """The request in the engine's terms. Raises `ApiError` 400."""
        return await make_job(self._request, self._variant, engine, self._context.headers, salt)

    def _answer(self, generation: Generation) -> Writer:
        return Answer(generation, self._request, self._name)


MakeExchange = Callable[[Asked], Exchange]


class Writer(EventWriter, Protocol):
    """Writes the answer of a generation, whole or as the events of a stream."""

    def whole(self) -> bytes: ...


class Stream:
    """Server-sent events. They begin with the first news of the generation: an early failure has a status."""

    def __init__(self, send: Send, context: RequestContext) -> None:
        self._send = send
        self._context = context

    async def run(
        self, generation: Generation, answer: EventWriter, ready: list[Choice], with_done: bool
    ) -> None:
        """Send chunks until all is done, beginning with the choices that are ready."""
        ended = False
        while not ended:
            choices, ready = ready or await generation.news(), []
            data = answer.chunks(choices)
            # What comes while a chunk is being sent is the next chunk's.
            ended = generation.done
            if ended:
                data += answer.end(with_done)
            if data or ended:
                generation.blocked = True
                await self._write(data, more=not ended)
                generation.blocked = False

    async def _write(self, data: bytes, more: bool) -> None:
        if not self._context.answering:
            headers = [*STREAM_HEADERS, *self._context.response_headers()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: ApiError, with_choices: bool) -> None:
        """End a stream that has begun with the error event; a client that doesn't read it is left alone."""
        if not self._context.answering:
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._write(error.event(with_choices), more=False)
        except TimeoutError:
            logger.info("%s: the client doesn't read; its connection is closed", self._context.name)

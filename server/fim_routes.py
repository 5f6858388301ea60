"""`POST /v1/fim/completions` and `POST /infill`: editors' requests, answered by the completions machinery."""

from __future__ import annotations

import secrets
from functools import partial

from tokenmill.server.admission import Job, make_job
from tokenmill.server.body import decode_object
from tokenmill.server.completions import Asked, Exchange, GeneratingEndpoint, MakeExchange, Writer
from tokenmill.server.fim_answers import FimAnswer, InfillAnswer, LineRules
from tokenmill.server.fim_protocol import FimRequest, InfillRequest
from tokenmill.server.generation import Generation
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.parse import check_conflicts, validated
from tokenmill.server.prompts import Infill
from tokenmill.server.protocol import CompletionRequest

FILTER_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "penalties",
    "frequency_penalty": "penalties",
    "repeat_penalty": "penalties",
}
"""Sampling settings, and the filter of `samplers` that each belongs to."""


class FimEndpoint(GeneratingEndpoint):
    """The handler of Mistral's route."""

    def _read(self, body: bytes) -> tuple[CompletionRequest, MakeExchange]:
        request = validated(decode_object(body), FimRequest, self._options.warn_unknown)
        return completion_of_fim(request), FimExchange


class InfillEndpoint(GeneratingEndpoint):
    """The handler of llama.cpp's route."""

    def _read(self, body: bytes) -> tuple[CompletionRequest, MakeExchange]:
        infill = validated(decode_object(body), InfillRequest, self._options.warn_unknown)
        return completion_of_infill(infill), partial(InfillExchange, infill)


def completion_of_fim(request: FimRequest) -> CompletionRequest:
    """Mistral's request as a completion. Raises `ApiError` 400."""
    given = request.model_dump(exclude_unset=True, exclude_none=True, exclude={"metadata", "random_seed"})
    if request.random_seed is not None:
        given["seed"] = request.random_seed
    return _checked(given)


def completion_of_infill(request: InfillRequest) -> CompletionRequest:
    """llama.cpp's request as a completion, with what isn't in `Infill`. Raises `ApiError` 400."""
    same = {"model", "stop", "stream", "ignore_eos"}
    same |= {
        name
        for name, filter_name in FILTER_FIELDS.items()
        if request.samplers is None or filter_name in request.samplers
    }
    given = request.model_dump(exclude_unset=True, exclude_none=True, include=same)
    if "repeat_penalty" in given:
        given["repetition_penalty"] = given.pop("repeat_penalty")
    given |= {"prompt": request.input_prefix, "suffix": request.input_suffix}
    if request.n_predict >= 0:
        given["max_tokens"] = request.n_predict
    if request.seed not in (None, -1):
        given["seed"] = request.seed
    return _checked(given)


def _checked(values: dict[str, object]) -> CompletionRequest:
    request = validated(values, CompletionRequest)
    check_conflicts(request)
    return request


class FimExchange(Exchange):
    """One request in Mistral's shape."""

    async def _job(self, engine: Engine, salt: str) -> Job:
        return await make_job(
            self._request,
            self._variant,
            engine,
            self._context.headers,
            salt,
            default_max_tokens=None,
            infill=self._infill(),
        )

    def _infill(self) -> Infill:
        return Infill()

    def _answer(self, generation: Generation) -> Writer:
        return FimAnswer(generation, self._name)


class InfillExchange(FimExchange):
    """One request in llama.cpp's shape."""

    def __init__(self, infill: InfillRequest, asked: Asked) -> None:
        super().__init__(asked)
        self._fields = infill

    async def _job(self, engine: Engine, salt: str) -> Job:
        # Blocks under a salt of its own are nobody else's, neither to read nor to be read.
        return await super()._job(engine, salt if self._fields.cache_prompt else secrets.token_hex(16))

    def _infill(self) -> Infill:
        files = tuple((file.filename, file.text) for file in self._fields.input_extra)
        return Infill(files, self._fields.prompt)

    def _answer(self, generation: Generation) -> Writer:
        fields = self._fields
        if fields.n_indent or fields.t_max_predict_ms:
            generation.watch = LineRules(fields.n_indent, fields.t_max_predict_ms)
        return InfillAnswer(
            generation,
            self._name,
            self._context.arrival,
            fields.return_tokens,
            fields.response_fields,
        )

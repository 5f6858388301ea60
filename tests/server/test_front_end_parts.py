"""Parts of the front end by themselves: frames, the guard, log lines, metrics, keys, cache salts."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.messages import (
    HEADER,
    Abort,
    Add,
    Delta,
    FromEngine,
    Outputs,
    Stats,
    TopLogprobs,
    encode_frame,
    to_engine_decoder,
)
from tokenmill.engine.sampling_params import SamplingParams
from tokenmill.server.admission import cache_salt
from tokenmill.server.auth import read_keys
from tokenmill.server.engine_client import EngineClient
from tokenmill.server.errors import ApiError, ClientGone, shorten, timed_out
from tokenmill.server.guard import Guard
from tokenmill.server.logprobs import LOWEST, ScoredTokens, chat_content, legacy_arrays
from tokenmill.server.logs import OneLineFormatter
from tokenmill.server.metrics import Histogram


class Recorder:
    """Sink and listener that write down what they hear."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.messages: list[FromEngine] = []
        self.lost: list[str] = []

    def on_delta(self, delta: Delta, now: float) -> None:
        self.deltas.append(delta)

    def on_process_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def on_message(self, message: FromEngine) -> None:
        self.messages.append(message)

    def on_lost(self, reason: str) -> None:
        self.lost.append(reason)


STATS = Stats(
    step=1,
    running=0,
    waiting=0,
    used_blocks=0,
    cached_blocks=0,
    free_blocks=0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    preemptions=0,
)


@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_frames_survive_any_division(cuts: list[int]) -> None:
    recorder = Recorder()
    client = EngineClient(recorder)
    client.add(Add(7, [1], SamplingParams()), recorder)
    messages = [
        Outputs([Delta(7, 0, [1, 2]), Delta(8, 0, [3])]),
        STATS,
        Outputs([Delta(7, 1, [], finish="length")]),
    ]
    data = b"".join(encode_frame(message) for message in messages)
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in itertools.pairwise(places):
        client.data_received(data[start:end])
    assert [type(message) for message in recorder.messages] == [Outputs, Stats, Outputs]
    assert [(delta.choice, delta.token_ids) for delta in recorder.deltas] == [(0, [1, 2]), (1, [])]


class KeepsErrors(Recorder):
    """A sink that keeps an exception, and with it the frames of all who called."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []

    def on_delta(self, delta: Delta, now: float) -> None:
        super().on_delta(delta, now)
        try:
            raise ValueError("kept")
        except ValueError as error:
            self.errors.append(error)


def test_an_exception_that_is_kept_holds_no_frame() -> None:
    sink = KeepsErrors()
    client = EngineClient(sink)
    client.add(Add(7, [1], SamplingParams()), sink)
    for token in range(3):
        client.data_received(encode_frame(Outputs([Delta(7, 0, [token])])))
    assert [delta.token_ids for delta in sink.deltas] == [[0], [1], [2]]


def test_client_speaks_to_the_engine_and_hears_of_its_end() -> None:
    async def talk() -> tuple[Recorder, bytes]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        recorder = Recorder()
        client = EngineClient(recorder)
        await client.connect(ours)
        client.add(Add(1, [5], SamplingParams()), recorder)
        client.add(Add(2, [6], SamplingParams()), recorder)
        client.abort(1, 0)
        client.abort(2)
        data = b""
        while data.count(b"Abort") < 2:
            await asyncio.sleep(0.01)
            data += theirs.recv(65536)
        theirs.close()
        while client.lost is None:
            await asyncio.sleep(0.01)
        client.abort(1)
        return recorder, data

    recorder, data = asyncio.run(talk())
    messages = []
    while data:
        (length,) = HEADER.unpack_from(data)
        messages.append(to_engine_decoder.decode(data[HEADER.size : HEADER.size + length]))
        data = data[HEADER.size + length :]
    assert [type(message) for message in messages] == [Add, Add, Abort, Abort]
    assert (messages[2].request, messages[2].choice, messages[3].choice) == (1, 0, None)
    assert len(recorder.lost) == 2, "the request that wasn't aborted, and the listener"


def guarded(
    body: Callable[[Guard], Awaitable[None]],
    receive: Callable[[], Awaitable[dict[str, str]]],
    timeout_s: float = 600,
) -> None:
    async def run() -> None:
        late = timed_out(timeout_s, None)
        async with Guard(receive, time.monotonic() + timeout_s, late) as guard:  # type: ignore[arg-type]
            await body(guard)

    asyncio.run(run())


async def never() -> dict[str, str]:
    await asyncio.sleep(3600)
    return {"type": "http.disconnect"}


async def at_once() -> dict[str, str]:
    return {"type": "http.disconnect"}


def test_guard_ends_at_the_deadline_or_when_the_client_leaves() -> None:
    async def wait(guard: Guard) -> None:
        await asyncio.sleep(3600)

    with pytest.raises(ApiError) as caught:
        guarded(wait, never, timeout_s=0.05)
    assert caught.value.status == 504
    with pytest.raises(ClientGone):
        guarded(wait, at_once)


def test_guard_lets_other_endings_through() -> None:
    async def finish(guard: Guard) -> None:
        await asyncio.sleep(0)

    async def fail(guard: Guard) -> None:
        raise KeyError("x")

    async def interrupt(guard: Guard) -> None:
        asyncio.get_running_loop().call_soon(guard.interrupt, ApiError(503, "first"))
        asyncio.get_running_loop().call_soon(guard.interrupt, ApiError(500, "second"))
        await asyncio.sleep(3600)

    guarded(finish, never)
    with pytest.raises(KeyError):
        guarded(fail, never)
    with pytest.raises(ApiError, match="first"):
        guarded(interrupt, never)


def test_guard_leaves_the_task_usable() -> None:
    async def run() -> bool:
        with pytest.raises(ClientGone):
            async with Guard(at_once, time.monotonic() + 600, timed_out(600, None)):  # type: ignore[arg-type]
                await asyncio.sleep(3600)
        await asyncio.sleep(0)
        task = asyncio.current_task()
        return task is not None and task.cancelling() == 0

    assert asyncio.run(run())


def test_cancellation_from_outside_stays_a_cancellation() -> None:
    async def run() -> None:
        async def inner() -> None:
            async with Guard(never, time.monotonic() + 600, timed_out(600, None)):  # type: ignore[arg-type]
                await asyncio.sleep(3600)

        task = asyncio.create_task(inner())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_log_lines_are_escaped_and_redacted() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "got %s", ("a\nb\x1b[2J\u2028 key-1 \x85",), None)
    line = OneLineFormatter(secrets=("key-1",)).format(record)
    assert line.endswith("INFO got a\\nb\\x1b[2J\\u2028 [redacted] \\u0085")


def test_histogram_counts_into_buckets() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 5.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.counts == [2, 4, 1]
    assert histogram.total == 14.0


def test_keys_come_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", " a,b  c\n")
    assert read_keys("SOME_KEYS") == ("a", "b", "c")
    assert read_keys("NOT_SET_AT_ALL") == ()
    assert read_keys(None) == ()


def test_cache_salts_differ_by_key_and_user() -> None:
    assert cache_salt("none", "k", "u") == ""
    assert cache_salt("key", "k", "u") == cache_salt("key", "k", None) != cache_salt("key", "l", None)
    assert len({cache_salt("user", k, u) for k in ("k", "l") for u in ("u", "v", None)}) == 6


def test_values_in_messages_are_short() -> None:
    assert shorten({"a": 1}) == '{"a":1}'
    assert len(shorten("x" * 10**6)) <= 80
    assert len(shorten([0] * 10**5)) <= 80
    assert shorten(10**400).startswith("1000")


class Letters:
    """A tokenizer for log-probabilities: ids are code points; 0 and 1 read alike."""

    def token_text(self, token: int) -> str:
        return "�" if token < 2 else chr(token)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def test_alternatives_that_read_alike_keep_the_highest() -> None:
    top = TopLogprobs([0, 1, 97], [-0.5, -1.0, -2.0])
    tokens = ScoredTokens([1, 97], [-1.0, float("-inf")], [top, top], [0, 1])
    arrays = legacy_arrays(Letters(), tokens, 3)  # type: ignore[arg-type]
    assert arrays["top_logprobs"] == [{"�": -0.5, "a": -2.0}, {"�": -0.5, "a": -2.0}]
    assert arrays["token_logprobs"] == [-1.0, LOWEST]
    content = chat_content(Letters(), tokens, 2)  # type: ignore[arg-type]
    assert [row["bytes"] for row in content] == [[1], [97]]
    assert [len(row["top_logprobs"]) for row in content] == [2, 2]  # type: ignore[arg-type]

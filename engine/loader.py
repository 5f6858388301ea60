"""From a source to a module that is ready to run: the one place where a model is loaded.

    source ─▶ files (checkpoint.py) ─▶ config and class (model_class.py) ─▶ guards (guards.py)
           ─▶ weights by memory map, straight to device and dtype ─▶ rotary tables pinned ─▶ linears fused

A safetensors checkpoint already in the wanted dtype is never copied on a CPU: its parameters are the mapped
file, and only what fusion concatenates takes memory of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenmill.engine import attention, gguf_cache, guards
from tokenmill.engine.checkpoint import Checkpoint, resolve
from tokenmill.engine.config import DType, EngineConfig
from tokenmill.engine.fusion import fuse_siblings
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.model_class import causal_lm_class, read_config
from tokenmill.engine.progress import Progress, quiet
from tokenmill.engine.rope import context_limit, pin_rope, stretched_limit
from tokenmill.engine.tokenizer_export import end_ids, export_tokenizer, load_tokenizer_info

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LoadError", "LoadedModel", "Progress", "load"]

DEFAULT_CONTEXT = 4096
DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
SAMPLES = 16
STORED = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM whose attention is ours, with all that the engine needs to know of it."""

    module: PreTrainedModel
    hf_config: PreTrainedConfig
    """The text model's own config."""
    tokenizer: TokenizerInfo
    device: torch.device
    dtype: torch.dtype
    max_context: int
    eos_ids: tuple[int, ...]
    logits_width: int
    fingerprint: str
    description: str
    model_type: str
    parameters: int
    fused: int
    """Groups of sibling linears that became one."""


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load `config.source`; raises LoadError with one line that says what stands in the way."""
    _refuse_unsupported(config)
    progress("finding the checkpoint", None)
    checkpoint = resolve(config.source, config.revision, progress)
    try:
        return _load(config, checkpoint, progress)
    except LoadError as error:
        raise LoadError(f"{config.source}: {error}") from None


def _refuse_unsupported(config: EngineConfig) -> None:
    if config.quantization is not None:
        raise LoadError(
            f"{config.source}: quantization {config.quantization} isn't supported yet; leave it out"
        )
    if config.compile:
        raise LoadError(f"{config.source}: compile isn't supported yet; leave it off")


def _load(config: EngineConfig, checkpoint: Checkpoint, progress: Progress) -> LoadedModel:
    device = pick_device(config.device)
    dtype, note = _pick_dtype(config.dtype, checkpoint, device)
    opened = _open(checkpoint, device, dtype, progress)
    module, text_config = opened.module, opened.module.config.get_text_config(decoder=True)
    max_context = _max_context(config.max_context, text_config)
    pin_rope(module, max_context)
    width = _logits_width(module, text_config)
    parameters = sum(x.numel() for x in module.parameters())
    fingerprint = fingerprint_of(module, _settings(text_config), config.quantization)
    return LoadedModel(
        module=module,
        hf_config=text_config,
        tokenizer=opened.tokenizer,
        device=device,
        dtype=dtype,
        max_context=max_context,
        eos_ids=tuple(x for x in opened.tokenizer.eos_ids if x < width),
        logits_width=width,
        fingerprint=fingerprint,
        description=_describe(text_config.model_type, parameters, dtype, device, note),
        model_type=text_config.model_type,
        parameters=parameters,
        fused=fuse_siblings(module) if opened.fusible else 0,
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A module with its weights in place, as the checkpoint has them."""

    module: PreTrainedModel
    tokenizer: TokenizerInfo
    fusible: bool


def _open(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress) -> _Opened:
    if checkpoint.gguf_file is None:
        return _open_folder(checkpoint, device, dtype, progress)
    folder = gguf_cache.converted_folder(checkpoint.gguf_file, dtype)
    if folder is None:
        model, tokenizer = gguf_cache.convert(checkpoint.gguf_file, dtype, progress)
        folder = gguf_cache.keep(checkpoint.gguf_file, model, tokenizer)
        if folder is None:
            return _adopt(model, export_tokenizer(tokenizer, end_ids(None, model.config)), device)
        del model
    return _open_folder(resolve(str(folder)), device, dtype, progress)


def _open_folder(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: Progress
) -> _Opened:
    full = read_config(checkpoint.folder)
    model_class, own = causal_lm_class(full)
    verdict = guards.check(model_class, own)
    module = _read_weights(checkpoint, model_class, own, device, dtype, progress)
    progress("reading the tokenizer", None)
    tokenizer = load_tokenizer_info(checkpoint.folder, full, checkpoint.hub_id)
    return _Opened(_frozen(module), tokenizer, verdict.fusible)


def _adopt(model: PreTrainedModel, tokenizer: TokenizerInfo, device: torch.device) -> _Opened:
    """A model that was converted in this process and couldn't be kept: given our attention, and moved."""
    verdict = guards.check(type(model), model.config)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    nn.Module.to(model, device)
    return _Opened(_frozen(model), tokenizer, verdict.fusible)


def _frozen(module: PreTrainedModel) -> PreTrainedModel:
    nn.Module.requires_grad_(module, False)
    nn.Module.train(module, False)
    return module


def pick_device(name: str) -> torch.device:
    """The device that `name` means; `auto` is the first GPU, else the CPU. Raises LoadError."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LoadError(f"device {name!r} is none; say auto, cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise LoadError(f"device {name!r} isn't supported; say auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise LoadError(f"device {name!r} isn't there: torch sees {count} GPUs; say auto or cpu")
    return torch.device("cuda", index)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are native, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))


def _pick_dtype(wanted: DType, checkpoint: Checkpoint, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to run in, and a word on why where it isn't plain.

    `auto` is the checkpoint's own. float16 has no fast CPU kernels (and overflows where bfloat16 doesn't), so
    there it becomes bfloat16 where that is native, else float32; so do GGUF's packed blocks anywhere.
    """
    if wanted != "auto":
        return getattr(torch, wanted), ""
    if checkpoint.gguf_file is not None:
        stored = gguf_cache.read_summary(checkpoint.gguf_file).stored
    else:
        stored = checkpoint.stored_dtype or ""
    own = STORED.get(stored)
    if own is not None and not (own is torch.float16 and device.type == "cpu"):
        return own, ""
    chosen = torch.bfloat16 if computes_bfloat16(device) else torch.float32
    return chosen, f"from {stored}"


def _read_weights(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> PreTrainedModel:
    """The module with its weights on `device`: all of them from the checkpoint, all of the right shape."""
    attention.register()
    options = {
        "config": config,
        "dtype": dtype,
        "device_map": None if device.type == "cpu" else {"": device},
        "attn_implementation": attention.NAME,
        "use_safetensors": True,
        "local_files_only": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    try:
        loaded = _from_pretrained(model_class, checkpoint.folder, options, progress)
    except torch.OutOfMemoryError:
        raise LoadError(f"its weights don't fit into the memory of {device}") from None
    except Exception as error:  # model classes and weight conversions fail in ways of their own
        raise LoadError(
            f"its weights don't make a {model_class.__name__} ({type(error).__name__}: {first_line(error)}); "
            "config.json and the safetensors files may be of different models"
        ) from None
    module: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise LoadError(
            f"{name} is {list(stored)} in the files, {list(expected)} by config.json: they don't fit together"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise LoadError(
            f"the files lack {missing[0]} ({len(missing)} weights of a {model_class.__name__} are missing); "
            "config.json and the safetensors files may be of different models"
        )
    return module


def _from_pretrained(
    model_class: Any, folder: Path, options: dict[str, Any], progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' own loading: (module, what it found amiss)."""
    stage = "loading weights"
    progress(stage, 0.0)
    for real_ranges in (True, False):
        try:
            with quiet(stage, progress), _PlainMeta(real_ranges):
                loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
                    str(folder), **options
                )
                return loaded
        except RuntimeError as error:
            # Few types combine a table with parameters while these have no storage: "… is on meta, not cpu".
            if not (real_ranges and "meta" in str(error)):
                raise
    raise AssertionError("unreachable: the second round returns or raises")


class _PlainMeta(TorchFunctionMode):
    """A module begins as tensors without storage (device meta); here what those do is kept cheap.

    Random values aren't drawn for them, and with `real_ranges` the tables made from `arange` are real from the
    start. torch computes both in Python on meta tensors, and imports sympy and torch._dynamo to do so.
    """

    def __init__(self, real_ranges: bool) -> None:
        super().__init__()
        self.real_ranges = real_ranges

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in DRAWS and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        if self.real_ranges and function is torch.arange and str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


def _max_context(wanted: int | None, text_config: Any) -> int:
    """Tokens of prompt and completion together: what is asked for, within what the model can hold."""
    limit = context_limit(text_config)
    if wanted is None:
        return limit or DEFAULT_CONTEXT
    if wanted < 1:
        raise LoadError(f"max_context must be at least 1, not {wanted}")
    return min(wanted, stretched_limit(text_config) or wanted)


def _logits_width(module: PreTrainedModel, text_config: Any) -> int:
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(text_config.vocab_size)


def fingerprint_of(module: nn.Module, *settings: object) -> str:
    """A hash of the engine's version, the settings and all tensors: name, type, shape, a sample of values.

    Of each tensor `SAMPLES` evenly spread values are read: few pages, and a fine-tune touches nearly all.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((version("tokenmill"), settings)).encode())
    samples: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        flat = tensor.detach().reshape(-1)
        samples.setdefault(tensor.dtype, []).append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES])
    for parts in samples.values():
        digest.update(torch.cat(parts).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(text_config: PreTrainedConfig) -> str:
    """A config's values as text, without what only tells where it came from."""
    fields = text_config.to_dict()
    return json.dumps({k: fields[k] for k in sorted(fields) if k not in guards.NAMES}, default=str)


def _describe(model_type: str, parameters: int, dtype: torch.dtype, device: torch.device, note: str) -> str:
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
    name = str(dtype).removeprefix("torch.") + (f" ({note})" if note else "")
    return f"{model_type}, {size} parameters, {name} on {device}"

"""From a source to a module that is ready to run: the one place where a model is loaded.

    source ─▶ files (checkpoint.py) ─▶ config and class (model_class.py) ─▶ guards (guards.py)
           ─▶ weights, straight to device and dtype (weights.py) ─▶ rotary tables pinned (rope.py)

A safetensors checkpoint already in the wanted dtype is never copied on a CPU: its parameters are the mapped
file. What packs or fuses them comes later (forward.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmill.engine import attention, gguf, gguf_cache, guards, stand_ins
from tokenmill.engine.block_weight import Blocks
from tokenmill.engine.checkpoint import MXFP4, Checkpoint, resolve, weight_files
from tokenmill.engine.config import DType, EngineConfig, Quantization
from tokenmill.engine.guards import Verdict
from tokenmill.engine.kernel_choice import FP8_CAPABILITY, has_cpu_kernels, kept_packings
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.messages import TokenizerInfo
from tokenmill.engine.model_class import causal_lm_class, read_config
from tokenmill.engine.model_size import ModelSize, in_words, size_of
from tokenmill.engine.packed_checkpoint import read_packed
from tokenmill.engine.progress import Progress
from tokenmill.engine.rope import context_limit, pin_rope, stretched_limit
from tokenmill.engine.tokenizer_export import ending_ids, export_tokenizer, load_tokenizer_info
from tokenmill.engine.weights import read_weights
from tokenmill.kernels.groups import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LoadError", "LoadedModel", "Progress", "load"]

DEFAULT_CONTEXT = 4096
SAMPLES = 16
STORED = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(slots=True)
class LoadedModel:
    """A causal LM, its attention ours where the verdict allows it, with all that the engine needs to know."""

    module: PreTrainedModel | None
    """None once the fused decoder has taken the weights over."""
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
    size: ModelSize
    verdict: Verdict
    """Which ways of running it are right."""
    blocks: dict[str, Blocks] = field(default_factory=dict)
    """Parameters whose values stay packed, as their file has them; in the module zeros stand for them."""
    copied: bool = False
    """On a CPU: whether the weights take memory of their own, because they were converted as they were read."""


def load(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load `config.source`; raises LoadError with one line that says what stands in the way."""
    if config.compile:
        raise LoadError(f"{config.source}: compile isn't supported yet; leave it off")
    progress("finding the checkpoint", None)
    checkpoint = resolve(config.source, config.revision, progress)
    try:
        return _load(config, checkpoint, progress)
    except LoadError as error:
        raise LoadError(f"{config.source}: {error}") from None


def _load(config: EngineConfig, checkpoint: Checkpoint, progress: Progress) -> LoadedModel:
    device = pick_device(config.device)
    _refuse_quantization(config.quantization, checkpoint, device)
    dtype, note = _pick_dtype(config.dtype, checkpoint, device)
    # Of several ranks each takes its part out of the mapped files, and only that to its device.
    whole_on = device if config.tensor_parallel == 1 else torch.device("cpu")
    opened = _open(config, checkpoint, whole_on, dtype, progress)
    module, text_config = opened.module, opened.module.config.get_text_config(decoder=True)
    max_context = _max_context(config.max_context, text_config)
    pin_rope(module, max_context)
    width = _logits_width(module, text_config)
    parameters = sum(x.numel() for x in module.parameters())
    held = {name: x for name, x in module.state_dict(keep_vars=True).items() if name not in opened.blocks}
    for name, blocks in opened.blocks.items():
        held |= {f"{name}.{i}": tensor for i, tensor in enumerate(blocks.tensors)}
    fingerprint = fingerprint_of(held, _settings(text_config), config.quantization, config.tensor_parallel)
    # No batch of ours is padded, but some types look for padding in every forward, waiting for the device.
    # (Past the attribute's own check: strict configs take no None for it.)
    vars(module.config)["pad_token_id"] = None
    return LoadedModel(
        module=module,
        tokenizer=opened.tokenizer,
        device=device,
        dtype=dtype,
        max_context=max_context,
        eos_ids=tuple(x for x in opened.tokenizer.eos_ids if x < width),
        logits_width=width,
        fingerprint=fingerprint,
        description=_describe(
            text_config.model_type,
            parameters,
            dtype,
            _place(config, device),
            note,
            config.quantization or (checkpoint.method if opened.blocks else None),
        ),
        model_type=text_config.model_type,
        parameters=parameters,
        size=size_of(module, text_config, config.quantization, opened.blocks),
        verdict=opened.verdict,
        blocks=opened.blocks,
        copied=_is_copied(module, checkpoint, dtype),
    )


def _is_copied(module: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether transformers had to convert what it read: to another dtype, or to experts in one tensor."""
    stored = STORED.get(checkpoint.stored_dtype or "")
    return stored is not dtype or any(".experts." in name for name, _ in module.named_parameters())


def _refuse_quantization(wanted: Quantization | None, checkpoint: Checkpoint, device: torch.device) -> None:
    """Say early, before weights are read, what can't be had on this device or of these files."""
    if wanted in ("fp8", "fp8_dynamic"):
        if device.type == "cpu":
            raise LoadError(f"quantization {wanted} needs a GPU; int8 and int4 work on a CPU")
        if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            raise LoadError(
                f"quantization {wanted} needs a GPU that knows 8-bit floats (compute capability 8.9 or later); "
                "int8 and int4 work on this one"
            )
    if wanted == "gguf" and checkpoint.gguf_file is None:
        raise LoadError(
            "quantization gguf keeps the blocks of a .gguf file, and this is none; say int8 or int4"
        )
    if wanted == "gguf" and device.type != "cpu":
        raise LoadError(
            f"quantization gguf works on a CPU, not on {device}; say int8 or int4, or leave it out"
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A module with its weights in place, as the checkpoint has them."""

    module: PreTrainedModel
    tokenizer: TokenizerInfo
    verdict: Verdict
    blocks: dict[str, Blocks] = field(default_factory=dict)


def _open(
    config: EngineConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> _Opened:
    if checkpoint.gguf_file is None:
        keep = frozenset() if checkpoint.packing is None else kept_packings(config, device)
        return _open_folder(checkpoint, device, dtype, progress, keep)
    if config.quantization == "gguf":
        return _open_blocks(checkpoint.gguf_file, dtype, progress)
    folder = gguf_cache.converted_folder(checkpoint.gguf_file, dtype)
    if folder is None:
        model, tokenizer = gguf_cache.convert(checkpoint.gguf_file, dtype, progress)
        folder = gguf_cache.keep(checkpoint.gguf_file, model, tokenizer)
        if folder is None:
            return _adopt(model, export_tokenizer(tokenizer, ending_ids(None, model.config)), device)
        del model
    return _open_folder(resolve(str(folder)), device, dtype, progress)


def _open_folder(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    keep: frozenset[Kind] = frozenset(),
) -> _Opened:
    full = read_config(checkpoint.folder)
    model_class, own = causal_lm_class(full)
    verdict = guards.check(model_class, own)
    read = partial(_read_module, checkpoint, model_class, own, verdict, device, dtype, progress)
    if verdict.decoder is None:
        keep = frozenset()
    try:
        module, blocks = read(keep)
    except LoadError:
        if not keep:
            raise
        module, blocks = read(frozenset())
    progress("reading the tokenizer", None)
    tokenizer = load_tokenizer_info(checkpoint.folder, full, checkpoint.hub_id)
    return _Opened(_frozen(module), tokenizer, verdict, blocks)


def _read_module(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    own: PreTrainedConfig,
    verdict: Verdict,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    keep: frozenset[Kind],
) -> tuple[PreTrainedModel, dict[str, Blocks]]:
    """The module, and those of its weights that stay packed: of kinds in `keep`."""
    packing, paged = checkpoint.packing, verdict.refusal is None
    if packing is None or (checkpoint.method == MXFP4 and "fp4" not in keep):
        return read_weights(checkpoint.folder, model_class, own, device, dtype, progress, paged=paged), {}
    weights = read_packed(weight_files(checkpoint.folder), packing, dtype, progress, keep, device)
    tensors, cpu = stand_ins.stand_ins(weights), torch.device("cpu")
    module = read_weights(None, model_class, own, cpu, dtype, progress, paged=paged, tensors=tensors)
    blocks = stand_ins.by_parameter(module, weights, tensors)
    stand_ins.move(module, device, blocks)
    return module, blocks


def _open_blocks(file: Path, dtype: torch.dtype, progress: Progress) -> _Opened:
    """A GGUF file whose weights stay in its blocks; the module has stand-ins, for the decoder to be read off it."""
    summary = gguf_cache.read_summary(file)
    gguf.check_family(summary)
    with gguf_cache.described(file, progress) as folder:
        full = read_config(folder)
        model_class, own = causal_lm_class(full)
        verdict = guards.check(model_class, own)
        if verdict.decoder is None:
            raise LoadError(
                f"quantization gguf needs the fused decoder, which doesn't run a {own.model_type}; leave it out"
            )
        weights = gguf.read_tensors(file, summary, own, dtype)
        tensors = stand_ins.stand_ins(weights)
        cpu = torch.device("cpu")
        module = read_weights(None, model_class, own, cpu, dtype, progress, tensors=tensors)
        strange = min(tensors.keys() - module.state_dict().keys(), default=None)
        if strange is not None:
            raise LoadError(f"quantization gguf: the file holds {strange}, which a {own.model_type} hasn't")
        progress("reading the tokenizer", None)
        tokenizer = load_tokenizer_info(folder, full, "")
    blocks = {name: weight for name, weight in weights.items() if not isinstance(weight, torch.Tensor)}
    return _Opened(_frozen(module), tokenizer, verdict, blocks)


def _adopt(model: PreTrainedModel, tokenizer: TokenizerInfo, device: torch.device) -> _Opened:
    """A model that was converted in this process and couldn't be kept: given our attention, and moved."""
    verdict = guards.check(type(model), model.config)
    if verdict.refusal is None:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    nn.Module.to(model, device)
    return _Opened(_frozen(model), tokenizer, verdict)


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
    """Whether products with bfloat16 weights are at least as fast as with float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = any(torch.cpu.get_capabilities().get(x) for x in ("avx512_bf16", "amx_bf16", "bf16"))
    return native or has_cpu_kernels()


def _pick_dtype(wanted: DType, checkpoint: Checkpoint, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to run in, and a word on why where it isn't plain.

    `auto` is the checkpoint's own. float16 has no fast CPU kernels (and overflows where bfloat16 doesn't), so
    there it becomes bfloat16 where that is fast, else float32; so do GGUF's packed blocks anywhere.
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


def _max_context(wanted: int | None, text_config: Any) -> int:
    """Tokens of prompt and completion together: what is asked for, within what the model can hold."""
    limit = context_limit(text_config)
    if wanted is None:
        return limit or DEFAULT_CONTEXT
    if wanted < 1:
        raise LoadError(f"max_context must be at least 1, not {wanted}")
    most = stretched_limit(text_config)
    if most is not None and wanted > most:
        raise LoadError(
            f"max_context {wanted} is more than the model's {most} tokens; lower it or leave it out"
        )
    return wanted


def _logits_width(module: PreTrainedModel, text_config: Any) -> int:
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(text_config.vocab_size)


def fingerprint_of(tensors: dict[str, Tensor], *settings: object) -> str:
    """A hash of the engine's version, the settings and all tensors: name, type, shape, a sample of values.

    Of each tensor `SAMPLES` evenly spread values are read: few pages, and a fine-tune touches nearly all.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((version("tokenmill"), settings)).encode())
    samples: dict[torch.dtype, list[Tensor]] = {}
    for name, tensor in tensors.items():
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


def _place(config: EngineConfig, device: torch.device) -> str:
    """Where the model is, for people."""
    size = config.tensor_parallel
    if size == 1:
        return str(device)
    return f"{size} GPUs" if device.type == "cuda" else f"{size} processes of the CPU"


def _describe(
    model_type: str,
    parameters: int,
    dtype: torch.dtype,
    place: str,
    note: str,
    quantization: str | None,
) -> str:
    name = str(dtype).removeprefix("torch.") + (f" ({note})" if note else "")
    special = {None: "", "fp8_dynamic": ", fp8 weights and activations"}
    held = special.get(quantization, f", {quantization} weights")
    return f"{model_type}, {in_words(parameters)} parameters, {name} on {place}{held}"

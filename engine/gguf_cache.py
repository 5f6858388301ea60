"""A GGUF file as the safetensors folder that transformers' reader makes of it, made once and kept.

    <cache>/gguf/<the path>/<size, time, versions>/header.json     what the file holds
                                                  /bfloat16/       config.json, *.safetensors, tokenizer files
                                                  /description/    the same without weights, which stay in blocks

Unpacking a file's blocks takes seconds to minutes; the folder loads by memory map. Config and tokenizer are what
transformers' reader says they are; so are the weights of families that `gguf.py` doesn't know, all others are
unpacked here, since that reader takes ten times as long for the same values. Older entries of the same path are
removed when a new one is written.
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from tokenmill.engine import gguf
from tokenmill.engine.disk_cache import cache_root, key_of, write_file, write_folder
from tokenmill.engine.gguf_config import configs_known
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.model_class import causal_lm_class
from tokenmill.engine.progress import Progress, quiet
from tokenmill.engine.weight_files import GGUFSummary, read_gguf_header
from tokenmill.engine.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 2
DESCRIPTION = "description"
HIDDEN_OF = {
    "ffn_down_exps": "moe_intermediate_size",
    "ffn_down_shexp": "shared_expert_intermediate_size",
}
"""Tensors by whose inputs a config's fields are known."""
logger = logging.getLogger(__name__)


def entry_folder(file: Path) -> Path:
    """Where what is made of `file`, as it is now, is kept."""
    stat = file.stat()
    state = key_of(FORMAT, stat.st_size, stat.st_mtime_ns, version("transformers"), version("tokenizers"))
    return cache_root() / "gguf" / key_of(file.resolve()) / state


def read_summary(file: Path) -> GGUFSummary:
    """What the file's header says; walked once, since half a vocabulary lies in it. Raises LoadError."""
    kept = entry_folder(file) / "header.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=GGUFSummary)
    except (OSError, msgspec.DecodeError):
        summary = read_gguf_header(file)
    try:
        write_file(kept, msgspec.json.encode(summary))
    except OSError as error:
        _warn(error)
    return summary


def converted_folder(file: Path, dtype: torch.dtype) -> Path | None:
    """The folder that holds `file` in `dtype`, if it was made before."""
    folder = entry_folder(file) / str(dtype).removeprefix("torch.")
    return folder if (folder / "config.json").exists() else None


def convert(
    file: Path, dtype: torch.dtype, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Unpack `file`: (model in `dtype` on the CPU, tokenizer). Raises LoadError."""
    from transformers import AutoModelForCausalLM, GgufConfig

    summary = read_summary(file)
    known = gguf.is_known(summary)
    with _reading(file, "converting the GGUF file (first start only)", progress) as where:
        config, tokenizer = _describe(where, file)
        if not known:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                **where, config=config, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
    if known:
        model_class, own = causal_lm_class(config)
        weights = gguf.read_tensors(file, summary, own, dtype)
        tensors = {
            name: each if isinstance(each, Tensor) else each.parameter() for name, each in weights.items()
        }
        cpu = torch.device("cpu")
        model = read_weights(None, model_class, own, cpu, dtype, progress, paged=False, tensors=tensors)
    # What is left of the reader must not be written into the folder's config.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def keep(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Write the converted checkpoint into the cache; None, after a warning, where that can't be done."""
    return _keep(file, str(model.dtype).removeprefix("torch."), model, tokenizer)


@contextmanager
def described(file: Path, progress: Progress) -> Iterator[Path]:
    """A folder with the file's config and tokenizer; one that goes away again where none can be kept."""
    folder: Path | None = entry_folder(file) / DESCRIPTION
    if folder is not None and (folder / "config.json").exists():
        yield folder
        return
    with _reading(file, "reading the GGUF file's tokenizer (first start only)", progress) as where:
        parts = _describe(where, file)
    folder = _keep(file, DESCRIPTION, *parts)
    if folder is not None:
        yield folder
        return
    with TemporaryDirectory(prefix="tokenmill-") as passing:
        _fill(Path(passing), *parts)
        yield Path(passing)


@contextmanager
def _reading(file: Path, stage: str, progress: Progress) -> Iterator[dict[str, Any]]:
    """What transformers' readers are told of `file`; their failures, of whatever kind, become a LoadError."""
    summary = read_summary(file)
    progress(stage, None)
    try:
        # The reader draws a bar of its own.
        with quiet(stage, progress), redirect_stderr(io.StringIO()), _one_reader(), configs_known():
            yield {
                "pretrained_model_name_or_path": str(file.parent),
                "gguf_file": file.name,
                "local_files_only": True,
                "trust_remote_code": False,
            }
    except Exception as error:  # the reader has no error of its own
        raise LoadError(
            f"{file.name} ({summary.architecture}) can't be converted by transformers {version('transformers')} "
            f"({first_line(error)}); a newer one may, or take the model's safetensors checkpoint"
        ) from None


@contextmanager
def _one_reader() -> Iterator[None]:
    """Each of transformers' parts makes a reader, which goes through half a vocabulary: here they share one."""
    package: Any = import_module("gguf")
    plain = package.GGUFReader
    package.GGUFReader = cache(plain)
    try:
        yield
    finally:
        package.GGUFReader = plain


def _describe(where: dict[str, Any], file: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    config: PreTrainedConfig = AutoConfig.from_pretrained(**where)
    summary = read_summary(file)
    _count_hidden(config, summary)
    divisors = gguf.read_values(file, summary, "rope_freqs.weight")
    if divisors is not None:
        _divide_frequencies(config, divisors.tolist())
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**where)
    return config, tokenizer


def _count_hidden(config: Any, summary: GGUFSummary) -> None:
    """How many hidden values an expert has, which transformers' reader doesn't look for."""
    shapes = {tensor.name: tensor.shape for tensor in summary.tensors}
    for name, field in HIDDEN_OF.items():
        if hasattr(config, field) and (shape := shapes.get(f"blk.0.{name}.weight")):
            setattr(config, field, shape[-1])


def _divide_frequencies(config: Any, divisors: list[float]) -> None:
    """Llama 3's stretched RoPE: llama.cpp's converter wrote it as divisors, which transformers' reader passes over.

    Of transformers' own forms `longrope` takes such a list; both of its lists are this one, for any length.
    """
    length = config.max_position_embeddings
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }


def _keep(file: Path, name: str, *parts: Any) -> Path | None:
    entry = entry_folder(file)
    try:
        write_folder(entry / name, lambda target: _fill(target, *parts))
        for old in entry.parent.iterdir():
            if old != entry:
                shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # safetensors and tokenizers report a full disk by exceptions of their own
        _warn(error)
        return None
    return entry / name


def _fill(folder: Path, *parts: Any) -> None:
    with quiet():
        for part in parts:
            part.save_pretrained(folder)


def _warn(error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    _warn_once(cache_root(), reason)


@cache
def _warn_once(root: Path, reason: str) -> None:
    """One line, though a start has several things to keep."""
    logger.warning(
        "the cache folder %s can't be written (%s), so the next start converts again; "
        "set TOKENMILL_CACHE to a folder with room",
        root,
        reason,
    )

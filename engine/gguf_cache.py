"""A GGUF file as the safetensors folder that transformers' reader makes of it, made once and kept.

    <cache>/gguf/<the path>/<size, time, versions>/header.json     what the file holds
                                                  /bfloat16/       config.json, *.safetensors, tokenizer files

Reading a GGUF file that way unpacks every block in Python and takes seconds to minutes; the folder loads by
memory map. Older entries of the same path are removed when a new one is written.
"""

from __future__ import annotations

import io
import logging
import shutil
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tokenmill.engine.disk_cache import cache_root, key_of, write_file, write_folder
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.progress import Progress, quiet
from tokenmill.engine.weight_files import GGUFSummary, read_gguf_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
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
    """Unpack `file` with transformers' reader: (model in `dtype` on the CPU, tokenizer). Raises LoadError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    summary = read_summary(file)
    stage = "converting the GGUF file (first start only)"
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    progress(stage, None)
    try:
        with quiet(stage, progress), redirect_stderr(io.StringIO()):  # the reader draws a bar of its own
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), quantization_config=GgufConfig(dequantize=True), dtype=dtype, **where
            )
    except Exception as error:  # the reader has no error of its own
        raise LoadError(
            f"{file.name} ({summary.architecture}) can't be converted ({first_line(error)}); "
            "take the model's safetensors checkpoint"
        ) from None
    # What is left of the reader must not be written into the folder's config.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def keep(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Write the converted checkpoint into the cache; None, after a warning, where that can't be done."""
    entry = entry_folder(file)
    folder = entry / str(model.dtype).removeprefix("torch.")

    def fill(target: Path) -> None:
        with quiet():
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)

    try:
        write_folder(folder, fill)
        for old in entry.parent.iterdir():
            if old != entry:
                shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # safetensors and tokenizers report a full disk by exceptions of their own
        _warn(error)
        return None
    return folder


def _warn(error: Exception) -> None:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    logger.warning(
        "the cache folder %s can't be written (%s), so the next start converts again; "
        "set TOKENMILL_CACHE to a folder with room",
        cache_root(),
        reason,
    )

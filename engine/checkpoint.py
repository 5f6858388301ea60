"""From a source, as `models.yaml` names it, to files on this machine that are worth loading.

    vendor/name            a repository of the Hub, through its cache
    ./folder               config.json beside *.safetensors
    ./file.gguf            one GGUF file
    package:MODULE/FILE    a file or folder that an installed Python package ships

Only safetensors and GGUF are read and no code of a checkpoint is ever run. What can't be loaded is refused
here, from names and headers, with one line.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.progress import Progress, download_bar
from tokenmill.engine.weight_files import read_safetensors_header

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges.txt",
]
HUB_OTHERS = ["*/*.safetensors", "consolidated*", "*.bin", "*.onnx*"]
MXFP4 = "mxfp4"
"""gpt-oss's packing of its experts, which transformers unpacks."""
PACKINGS = ("fp8", "compressed-tensors", "modelopt", "modelopt_fp4", "gptq", "awq")
"""Those that packed_checkpoint.py unpacks."""
BITS = {"gptq": (2, 4, 8), "awq": (4,)}
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def _silent(stage: str, fraction: float | None) -> None:
    """Nobody to tell."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files whose headers were checked: a folder with `config` (config.json's content), or a `gguf_file`."""

    source: str
    folder: Path
    config: dict[str, Any]
    stored_dtype: str | None
    """The name by which safetensors calls the type of the largest tensor (BF16, F16, F32)."""
    gguf_file: Path | None = None
    hub_id: str = ""
    """The repository's name when the files came from the Hub."""
    packing: dict[str, Any] | None = None
    """`quantization_config` where the weights are packed (packed_checkpoint.py)."""

    @property
    def method(self) -> str:
        """How they are packed, for people; empty where they aren't."""
        return str((self.packing or {}).get("quant_method", ""))


def resolve(source: str, revision: str | None = None, progress: Progress = _silent) -> Checkpoint:
    """Find `source`, fetching it when it is a Hub id, and check it; raises LoadError."""
    try:
        path, hub_id = _find(source, revision, progress)
        if path.is_dir():
            return _check_folder(source, path, hub_id)
        if path.suffix != ".gguf":
            raise LoadError(
                f"{path.name} is neither a .gguf file nor a folder (name the one that it lies in)"
            )
        return Checkpoint(source, path.parent, {}, None, path)
    except LoadError as error:
        raise LoadError(f"{source}: {error}") from None
    except OSError as error:
        raise LoadError(f"{source}: can't be read ({error.strerror or first_line(error)})") from None


def _find(source: str, revision: str | None, progress: Progress) -> tuple[Path, str]:
    """The file or folder, and the repository's name when it is the Hub's."""
    if source.startswith("package:"):
        return _find_in_package(source.removeprefix("package:")), ""
    path = Path(source).expanduser()
    if source and path.exists():
        return path, ""
    if source.endswith(".gguf") or source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        raise LoadError("no such file or folder (a Hub id reads vendor/name)")
    return _download(source, revision, progress), source


def _find_in_package(name: str) -> Path:
    """MODULE/FILE, found without importing the module: its code has no part in this."""
    module, _, inside = name.partition("/")
    top, *rest = module.split(".")
    if not inside or not all(part.isidentifier() for part in (top, *rest)):
        raise LoadError("a source in a package reads package:MODULE/FILE")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise LoadError(f"no Python package {top} is installed here; install the one that ships the model")
    roots = spec.submodule_search_locations or ([str(Path(spec.origin).parent)] if spec.origin else [])
    for root in roots:
        path = Path(root, *rest, inside)
        if path.exists() and path.resolve().is_relative_to(Path(root).resolve()):
            return path
    raise LoadError(f"the package {module} ships no {inside}")


def _download(name: str, revision: str | None, progress: Progress) -> Path:
    """A snapshot of a Hub repository's safetensors and small files, from the cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_OTHERS,
            tqdm_class=download_bar(f"downloading {name}", progress),
        )
    except GatedRepoError:
        raise LoadError("the Hub asks for a licence to be accepted: do so there, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise LoadError(
            "neither a folder here nor a repository of the Hub (private ones need HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise LoadError(f"the repository has no revision {revision}") from None
    except LocalEntryNotFoundError:
        raise LoadError(
            "no folder here, not in the Hub's cache, and the Hub can't be reached (offline, or HF_HUB_OFFLINE "
            f"is set); fetch it once online with `hf download {name}`, or name a folder or a .gguf file"
        ) from None
    except HFValidationError as error:
        raise LoadError(f"no such folder here, and no Hub id ({first_line(error)})") from None
    except Exception as error:  # the network's and the disk's, in the words of several libraries
        raise LoadError(
            f"can't be fetched into the Hub's cache ({type(error).__name__}: {first_line(error)}); "
            "what arrived is kept, so starting again goes on from there"
        ) from None
    return Path(folder)


def _check_folder(source: str, folder: Path, hub_id: str) -> Checkpoint:
    config = _read_json(folder / "config.json", "a checkpoint's folder needs it beside its weights")
    _refuse_foreign(folder, config)
    tensors = {}
    for file, expected in weight_files(folder).items():
        held = read_safetensors_header(file)
        absent = next((name for name in expected if name not in held), None)
        if absent is not None:
            raise LoadError(f"{INDEX} puts {absent} into {file.name}, which lacks it; fetch both again")
        tensors.update(held)
    largest = max(tensors.values(), key=lambda x: math.prod(x.shape), default=None)
    if largest is None:
        raise LoadError("its safetensors files hold no tensor")
    method = _packing(config)
    stored = largest.dtype if method is None else str(method).upper()
    packing = config["quantization_config"] if method in (MXFP4, *PACKINGS) else None
    return Checkpoint(source, folder, config, stored, hub_id=hub_id, packing=packing)


def _refuse_foreign(folder: Path, config: dict[str, Any]) -> None:
    """Adapters and weights in most packings aren't loaded, and code isn't run.

    Many repositories bring code (`auto_map`) from before transformers knew their type. Its own class is then
    the better one, and nothing here ever lets transformers run theirs, so they are served without it. A type
    that transformers doesn't know is refused later, by `model_class.read_config`.
    """
    tokenizer = folder / "tokenizer_config.json"
    if config.get("auto_map") or (tokenizer.exists() and _read_json(tokenizer).get("auto_map")):
        logger.warning(
            "%s brings code of its own (auto_map), which is never run: transformers' class for %r is used",
            folder,
            config.get("model_type"),
        )
    if (folder / "adapter_config.json").exists():
        raise LoadError("adapter_config.json says that it is an adapter: merge it into its base model first")
    if _packing(config) not in (None, MXFP4):
        _refuse_packing(config["quantization_config"])


def _refuse_packing(settings: object) -> None:
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method not in PACKINGS:
        raise LoadError(f"its weights are packed ({method}), which isn't read yet: take the unpacked one")
    if str(settings.get("version", "gemm")).lower() != "gemm" and method == "awq":
        raise LoadError(f"its weights are packed by AWQ's version {settings['version']}; only gemm is read")
    bits = settings.get("bits", 4)
    if bits not in BITS.get(str(method), (bits,)):
        raise LoadError(f"its weights are packed ({method}) in {bits} bits, which isn't read")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise LoadError(f"its weights are sparse ({sparsity}), which isn't read: take the dense one")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise LoadError("its activations are to be rotated (transform_config), which isn't done here")


def _packing(config: dict[str, Any]) -> object:
    """How a checkpoint's weights are packed; None: not at all."""
    packed = config.get("quantization_config")
    return (packed.get("quant_method") if isinstance(packed, dict) else packed) or None


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files to read, each with the tensors that the index expects in it."""
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: []}
    if not (folder / INDEX).exists():
        unsafe = sorted(x.name for x in folder.iterdir() if x.suffix in UNSAFE)
        if unsafe:
            raise LoadError(
                f"{unsafe[0]} may hold code (pickle) and isn't read; convert the checkpoint to safetensors"
            )
        raise LoadError(f"there is neither {WEIGHTS} nor {INDEX} in the folder")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{INDEX} has no weight_map")
    files: dict[Path, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError(
                f"{INDEX} puts {tensor} into {name!r}, which is no safetensors file of this folder"
            )
        files.setdefault(folder / name, []).append(tensor)
    missing = sorted(file.name for file in files if not file.exists())
    if missing:
        raise LoadError(
            f"{INDEX} names {missing[0]}, which isn't there ({len(missing)} missing); fetch it again"
        )
    return files


def _read_json(file: Path, why: str = "") -> dict[str, Any]:
    if not file.exists():
        raise LoadError(f"there is no {file.name}" + (f": {why}" if why else ""))
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file.name} is no JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise LoadError(f"{file.name} is no JSON object")
    return content

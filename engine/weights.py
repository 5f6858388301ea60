"""A checkpoint's weights into a module, by transformers' own loader and what it leaves to do.

transformers builds the module without storage, maps the files, and gives each parameter its tensor: on a CPU
a view of the mapped file when the dtype is the same, else a converted copy. It only warns when tensors are
missing or of another shape, and fills in random ones; here that is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenmill.engine import attention
from tokenmill.engine.load_error import LoadError, first_line
from tokenmill.engine.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


def read_weights(
    folder: Path | None,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    paged: bool = True,
    tensors: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The module in `dtype` with its weights on `device`, all of them from `folder`; raises LoadError.

    `paged`: with our attention, else with the type's own. Without a folder the weights are `tensors`, unpacked.
    """
    attention.register()
    if tensors is not None:
        vars(config).pop("quantization_config", None)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "device_map": None if device.type == "cpu" else {"": device},
        **({"attn_implementation": attention.NAME} if paged else {}),
        "use_safetensors": True,
        "local_files_only": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
        **({} if tensors is None else {"state_dict": tensors}),
    }
    if tensors is None and getattr(config, "quantization_config", None) is not None:
        from transformers.utils.quantization_config import Mxfp4Config

        options["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        loaded = _from_pretrained(model_class, folder, options, progress)
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
    model_class: Any,
    folder: Path | None,
    options: dict[str, Any],
    progress: Progress,
    real_ranges: bool = True,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """transformers' own loading: the module, and what it found amiss."""
    stage = "loading weights"
    progress(stage, 0.0)
    try:
        with quiet(stage, progress), _PlainMeta(real_ranges):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
                None if folder is None else str(folder), **options
            )
            return loaded
    except RuntimeError as error:
        # Few types combine a table with parameters while these have no storage: "… is on meta, not cpu".
        if real_ranges and "meta" in str(error):
            return _from_pretrained(model_class, folder, options, progress, real_ranges=False)
        raise


class _PlainMeta(TorchFunctionMode):
    """A module begins as tensors without storage (device meta); here what those do is kept cheap.

    Random values aren't drawn for them, and with `real_ranges` the tables made from `arange` are real from
    the start. torch does such things in Python for meta tensors, importing sympy and torch._dynamo for it.
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
        if function is torch.empty_like and args[0].is_meta:
            return torch.empty(args[0].shape, **{"dtype": args[0].dtype, **kwargs})
        return function(*args, **kwargs)

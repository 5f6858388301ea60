"""A module around weights that stay packed: tensors that take no memory stand for them.

transformers loads it as any other, the decoder is read off it, and the description then gets the packed weights in
the stand-ins' places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tokenmill.engine.block_weight import Blocks, ExpertBlocks
from tokenmill.engine.decoder_spec import DecoderSpec, replace_tensors
from tokenmill.engine.group_weight import GroupExperts
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.model_size import text_part


def stand_ins(weights: Mapping[str, Tensor | Blocks]) -> dict[str, Tensor]:
    """Tensors of the weights' shapes; packed ones become zeros that take no memory."""
    return {
        name: weight if isinstance(weight, Tensor) else _zeros(_shape(weight), weight.dtype)
        for name, weight in weights.items()
    }


def _shape(weight: Blocks) -> tuple[int, ...]:
    """That of the parameter."""
    if isinstance(weight, GroupExperts | ExpertBlocks) and weight.turned:
        return weight.shape[0], weight.shape[2], weight.shape[1]
    return weight.shape


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Of experts one is there for all, since torch's grouped product wants rows that lie side by side."""
    once = torch.zeros(shape[1:] if len(shape) == 3 else (), dtype=dtype, device=device)
    return once.expand(shape)


def by_parameter(
    module: nn.Module, weights: Mapping[str, Tensor | Blocks], tensors: Mapping[str, Tensor]
) -> dict[str, Blocks]:
    """Packed `weights` by the names of the parameters that hold the stand-ins `tensors`: a type may rename them.

    Raises LoadError where transformers made something else of one.
    """
    names = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
    found: dict[str, Blocks] = {}
    for name, weight in weights.items():
        if isinstance(weight, Tensor):
            continue
        parameter = names.get(tensors[name].data_ptr())
        if parameter is None:
            raise LoadError(f"the files hold {name}, which this type has no place for")
        found[parameter] = weight
    return found


def move(module: nn.Module, device: torch.device, blocks: Mapping[str, Blocks]) -> None:
    """Move what is real of `module` to `device`."""
    held = {parameter.data_ptr() for name, parameter in module.named_parameters() if name in blocks}

    def moved(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in held:
            return _zeros(tuple(tensor.shape), tensor.dtype, device)
        return tensor.to(device)

    if device.type != "cpu":
        nn.Module._apply(module, moved)  # type: ignore[no-untyped-call]


def describe_around(
    read_off: Callable[[], DecoderSpec], module: nn.Module, blocks: Mapping[str, Blocks]
) -> DecoderSpec:
    """What `read_off` makes of `module`, with `blocks` by parameter in place.

    Where a weight's rows or values are needed for that, it is unpacked.
    """
    spec = read_off()
    needed = _put(spec, module, blocks)
    if not needed:
        return spec
    for name in needed:
        module.get_parameter(name).data = blocks[name].parameter()
    spec = read_off()
    _put(spec, module, {name: weight for name, weight in blocks.items() if name not in needed})
    return spec


def _put(spec: DecoderSpec, module: nn.Module, blocks: Mapping[str, Blocks]) -> list[str]:
    """Put each of `blocks` where `spec` has its parameter; the names of those of the text's part that it hasn't."""
    inner = text_part(module)
    own = {id(parameter) for parameter in (module if inner is None else inner).parameters()}
    held = {id(x): (name, blocks[name]) for name, x in module.named_parameters() if name in blocks}
    placed: set[str] = set()

    def put(tensor: Tensor) -> Tensor | Blocks:
        name, weight = held.get(id(tensor), ("", tensor))
        placed.add(name)
        return weight

    replace_tensors(spec, put)
    return [name for key, (name, _) in held.items() if key in own and name not in placed]

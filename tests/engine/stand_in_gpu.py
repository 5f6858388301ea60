"""A GPU that isn't there, for what only goes wrong on one: the whole engine runs on it, kernels interpreted.

    tensor "on cuda:0"     a CPU tensor whose storage is marked; `device` and `is_cuda` say so
    pinned ─▶ device       done at once; when an event or a wait says that it has run, the source must be unchanged
    device ─▶ pinned       done late: until somebody waits for it the target holds garbage
    graph                  the operations and launches between capture_begin and capture_end, done again by replay;
                           what they allocated is garbage before a replay, and after that of another graph

It raises `Fault` for what a GPU refuses or gets wrong: an operation that mixes host and device (numbers of no
dimension may), a kernel that is handed host memory, pinned memory written before its copy has run, and, while
capturing, whatever waits or copies from the host. It counts what makes the host wait, and each variant of a
kernel that Triton would compile: by constants, types, and the divisibility of integers and addresses.

It can't show races between streams or between the programs of a kernel, memory that is given back too early, what
the hardware computes, how much of it fits, or how fast anything is. Captured work is run while it is captured.
Operations that code in C++ does unseen by `TorchFunctionMode` aren't checked.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

GPU = torch.device("cuda", 0)
MEMORY = 140 << 30
GARBAGE = 0x5B
ASKS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "equal",
    "allclose",
    "__contains__",
}
"""Operations whose answer is a number of the host's."""
SIZED_BY_VALUES = {"nonzero", "masked_select", "unique"}
MIXES = {"__getitem__", "__setitem__", "__set__", "set_", "type_as", "load_state_dict", "copy_"}
"""Operations that take tensors of both, or are looked at for themselves."""
DEVICE, IS_CUDA, IS_CPU = (getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))


class Fault(AssertionError):
    """What wouldn't have gone well on a GPU."""


def tensors_in(*values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def storage_of(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def is_marked(tensor: Tensor, mark: str) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.device.type == "cpu" and getattr(storage_of(tensor), mark, False)


def on_gpu(tensor: Tensor) -> bool:
    return is_marked(tensor, "stands_on_gpu")


def is_pinned(tensor: Tensor) -> bool:
    return is_marked(tensor, "stands_pinned")


def mark(tensors: list[Tensor], name: str) -> None:
    for tensor in tensors:
        if tensor.device.type == "cpu":
            setattr(storage_of(tensor), name, True)


def spoil(tensor: Tensor) -> None:
    """What memory holds that nobody has written."""
    storage_of(tensor).fill_(GARBAGE)


@dataclass(slots=True)
class Graph:
    """A captured graph: what was done, in order, and the memory of its own."""

    gpu: StandInGpu
    work: list[Callable[[], None]] = field(default_factory=list)
    private: list[Tensor] = field(default_factory=list)
    replays: int = 0

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        if self.gpu.stream == 0:
            raise Fault("a graph is captured on a stream that isn't the default one")
        self.gpu.must_not_wait("another capture")
        self.gpu.capturing = self
        self.gpu.graphs.append(self)

    def capture_end(self) -> None:
        self.gpu.capturing = None
        self.spoil()

    def record(self, again: Callable[[], object], made: list[Tensor]) -> None:
        """An operation whose new tensors are `made`: done again, its results go where they went."""

        def work() -> None:
            found = tensors_in(again())
            for old, new in zip(made, found[-len(made) :] if made else [], strict=True):
                old.copy_(new)

        self.private += made
        self.work.append(work)

    def spoil(self) -> None:
        for tensor in self.private:
            spoil(tensor)

    def replay(self) -> None:
        self.replays += 1
        with torch._C.DisableTorchFunction():
            for graph in self.gpu.graphs:
                graph.spoil()
            for work in self.work:
                work()


@dataclass(slots=True)
class Event:
    """Passes when the copies that were begun before it have run."""

    gpu: StandInGpu
    enable_timing: bool = False
    after: int = 0

    def record(self, stream: object = None) -> None:
        self.after = self.gpu.begun

    def synchronize(self) -> None:
        self.gpu.must_not_wait("an event")
        self.gpu.run_copies(self.after)


@dataclass(slots=True)
class StandInGpu:
    """The device: copies under way, the graph being captured, and what was seen."""

    waits: Counter[str] = field(default_factory=Counter)
    """What made the host wait, and how often."""
    variants: dict[tuple[object, ...], str] = field(default_factory=dict)
    """Every variant of a kernel that was launched, with the kernel's name."""
    graphs: list[Graph] = field(default_factory=list)
    capturing: Graph | None = None
    stream: int = 0
    begun: int = 0
    checked: int = 0
    """Copies from pinned memory whose source was still as it had been."""
    late: int = 0
    """Copies to pinned memory that came when they were waited for."""
    _copies: list[tuple[int, Tensor, Tensor, bool]] = field(default_factory=list)

    def must_not_wait(self, what: str) -> None:
        if self.capturing is not None:
            raise Fault(f"{what}: not while a graph is captured")

    def wait(self, what: str) -> None:
        """The host waits for all that the device does."""
        self.must_not_wait(what)
        self.waits[what] += 1
        self.run_copies(self.begun)

    def begin_copy(self, target: Tensor, value: Tensor, *, to_host: bool) -> None:
        self.begun += 1
        self._copies.append((self.begun, target, value, to_host))

    def run_copies(self, until: int) -> None:
        """Finish the copies up to one. Those to the device were made when they began: was that right?"""
        due = [copy for copy in self._copies if copy[0] <= until]
        self._copies = [copy for copy in self._copies if copy[0] > until]
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            for _, target, value, to_host in due:
                if to_host:
                    target.copy_(value)
                    self.late += 1
                elif not torch.equal(target, value):
                    raise Fault("pinned memory was written before its copy to the device had run")
                else:
                    self.checked += 1

    @contextmanager
    def on_stream(self, stream: object) -> Iterator[None]:
        self.stream += 1
        try:
            yield
        finally:
            self.stream -= 1

    def launch(self, run: Callable[..., None], kernel: Any, args: Any, grid: Any, **options: Any) -> None:
        """A kernel's launch, in the place of the interpreter's own."""
        with torch._C.DisableTorchFunction():
            for tensor in tensors_in(args, options):
                if not on_gpu(tensor):
                    raise Fault(f"{kernel.__name__}: tensor {tuple(tensor.shape)} lies in the host's memory")
            self.variants.setdefault(variant(kernel, args, options), kernel.__name__)
            work = partial(run, kernel, *args, grid=grid, **options)
            work()
        if self.capturing is not None:
            self.capturing.record(work, [])


def variant(kernel: Any, args: Any, options: dict[str, Any]) -> tuple[object, ...]:
    """What Triton compiles a kernel anew for, as its documentation of `triton.jit` has it."""
    signature = inspect.signature(kernel.fn)
    named = {name: value for name, value in options.items() if name in signature.parameters}
    bound = signature.bind(*args, **named)
    bound.apply_defaults()
    plain = set(kernel.kwargs.get("do_not_specialize") or ())
    anywhere = plain | set(kernel.kwargs.get("do_not_specialize_on_alignment") or ())
    key: list[object] = [kernel.__name__, *sorted((k, v) for k, v in options.items() if k not in named)]
    for name, value in bound.arguments.items():
        if "constexpr" in str(signature.parameters[name].annotation):
            key.append((name, value))
        elif isinstance(value, Tensor):
            key.append((name, value.dtype, name in anywhere or value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not isinstance(value, bool):
            kind = None if name in plain else (value == 1, value % 16 == 0)
            key.append((name, -(2**31) <= value < 2**31, kind))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)


class _Watch(TorchFunctionMode):
    """Sees every operation on tensors before torch does."""

    def __init__(self, gpu: StandInGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        given = tensors_in(args, kwargs)
        places = [on_gpu(tensor) for tensor in given]
        if name in ("to", "cuda", "cpu") and given:
            return self._move(name, args, kwargs)
        if name == "copy_" and places[0] != places[1] and given[1].dim():
            return self._copy(*given, lazy=kwargs.get("non_blocking", False))
        if name == "is_pinned":
            return is_pinned(given[0])
        if name == "numpy" and places[0]:
            raise Fault("numpy() of a tensor on the device")
        if any(places):
            self._check(name, given, places, args)
        return self._run(func, name, args, kwargs, given, any(places))

    def _property(self, func: Any, args: Any) -> Any:
        """What a tensor says of its place."""
        if func == DEVICE and on_gpu(args[0]):
            return GPU
        if func in (IS_CUDA, IS_CPU) and on_gpu(args[0]):
            return func == IS_CUDA
        return func(*args)

    def _check(self, name: str, given: list[Tensor], places: list[bool], args: Any) -> None:
        """Refuse what mixes host and device, and note what makes the host wait."""
        if name in ASKS | SIZED_BY_VALUES:
            self._gpu.wait(name)
        if name in ("__getitem__", "__setitem__"):
            index = [x for x in tensors_in(args[1]) if x.dim()]
            if any(x.dtype == torch.bool or not on_gpu(x) for x in index):
                self._gpu.wait(f"{name} by a mask or by indices of the host's")
        if name not in MIXES:
            for tensor, there in zip(given, places, strict=True):
                if not there and tensor.dim() and tensor.device.type == "cpu":
                    raise Fault(f"{name}: a tensor {tuple(tensor.shape)} of the host's among the device's")

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], there: bool) -> Any:
        """Run it on the CPU; what it makes is where it was asked for, or where its operands are."""
        gpu, wanted = self._gpu, kwargs.get("device")
        if wanted is not None:
            there = torch.device(wanted).type == "cuda"
            kwargs["device"] = "cpu" if there else wanted
            if there and name in ("tensor", "as_tensor"):
                gpu.wait("a tensor made of the host's numbers")
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        made = tensors_in(result)
        if there:
            mark(made, "stands_on_gpu")
            if gpu.capturing is not None:
                known = {storage_of(x)._cdata for x in given}
                fresh = made if not given else [x for x in made if storage_of(x)._cdata not in known]
                gpu.capturing.record(partial(func, *args, **kwargs), fresh)
        if pinned:
            mark(made, "stands_pinned")
        return result

    def _copy(self, target: Tensor, source: Tensor, *, lazy: bool) -> Tensor:
        """Between host and device: without a wait only from and to pinned memory."""
        to_host = on_gpu(source)
        self._gpu.must_not_wait("a copy between host and device")
        if not (lazy and is_pinned(target if to_host else source)):
            self._gpu.wait("a copy that isn't of pinned memory or isn't asked not to block")
            target.copy_(source)
        elif to_host:
            self._gpu.begin_copy(target, source.clone(), to_host=True)
            target.reshape(-1).view(torch.uint8).fill_(GARBAGE)
        else:
            target.copy_(source)
            self._gpu.begin_copy(source, source.clone(), to_host=False)
        return target

    def _move(self, name: str, args: Any, kwargs: Any) -> Tensor:
        """`to`, `cuda` and `cpu`: a tensor of another place is another tensor."""
        tensor, rest = args[0], list(args[1:])
        place = kwargs.pop("device", None) if name == "to" else name
        kwargs.pop("non_blocking", None)
        if rest and isinstance(rest[0], str | torch.device | int) and not isinstance(rest[0], bool):
            place = rest.pop(0)
        elif rest and isinstance(rest[0], Tensor):
            place, rest[0] = ("cuda" if on_gpu(rest[0]) else "cpu"), rest[0].dtype
        there = on_gpu(tensor)
        wanted = there if place is None else torch.device(place).type == "cuda"
        rest = [x for x in rest if x is not None]
        if place is not None and torch.device(place).type == "meta":
            return tensor.to("meta", *rest, **kwargs)
        if wanted == there:
            if not rest and not kwargs:
                return tensor
            return self._run(Tensor.to, "to", (tensor, *rest), kwargs, [tensor], there)
        self._gpu.wait("a tensor moved between host and device")
        moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        moved = moved.clone() if storage_of(moved)._cdata == storage_of(tensor)._cdata else moved
        if wanted:
            mark([moved], "stands_on_gpu")
        return moved


@contextmanager
def stand_in_gpu() -> Iterator[StandInGpu]:
    """torch sees one H200 with 140 GiB free; launches of Triton's interpreter go there."""
    gpu = StandInGpu()
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=MEMORY)
    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "current_device": lambda: 0, "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY), "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: gpu.must_not_wait("empty_cache"),
        "Stream": lambda device=None: object(), "stream": gpu.on_stream, "Event": partial(Event, gpu),
        "CUDAGraph": partial(Graph, gpu), "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    run = interpreter.InterpretedFunction.run

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        gpu.launch(partial(_launch, run), kernel, args, grid, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(interpreter.InterpretedFunction, "run", launch)
        with _Watch(gpu):
            yield gpu


def _launch(run: Callable[..., None], kernel: Any, *args: Any, grid: Any, **options: Any) -> None:
    with torch._C.DisableTorchFunction():
        run(kernel, *args, grid=grid, warmup=False, **options)

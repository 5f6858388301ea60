"""Import transformers without the parts that an engine process on one device never calls.

Importing a transformers model costs 2.3 s of CPU time beyond torch, most of it for compilers, distributed
tensors and optimisers that only decorators and unused code paths mention:

    torch._dynamo, torch._inductor, sympy      for decorators that matter under torch.compile only
    torch.distributed.tensor, .fsdp            for sharded models
    scipy.optimize                             for the losses of object detection

transformers itself runs where scipy or torch.distributed are missing, so it is told that they are; dynamo's
decorators stand in as ones that do nothing. What remains takes 0.9 s. The process keeps that view of its
machine for good, so this is for a process of the engine's own, never for a user's, and not for
transformers' own tensor parallelism or torch.compile.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"
INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"
USED = ("modeling_utils", "masking_utils", "modeling_layers", "models.auto.modeling_auto")


def import_transformers() -> bool:
    """Import what loading a model needs of transformers; tells whether the rest was left out.

    It isn't where transformers or dynamo are imported already, or where this release can't do without.
    """
    if "transformers" in sys.modules or DYNAMO in sys.modules:
        return False
    importlib.import_module("torch")
    try:
        with ExitStack() as stack:
            for withheld in (_no_collection(), _no_distributed(), _no_scipy(), _no_dynamo()):
                stack.enter_context(withheld)
            for name in USED:
                importlib.import_module(f"transformers.{name}")
            # Both answers are remembered by transformers from here on.
            utils: Any = importlib.import_module("transformers.utils.import_utils")
            return not (utils.is_torch_distributed_available() or utils.is_scipy_available())
    except (ImportError, AttributeError, TypeError, NameError):
        for name in [x for x in sys.modules if x.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        return False


@contextmanager
def _no_collection() -> Iterator[None]:
    """Imports make many objects and no garbage: looking for it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_distributed() -> Iterator[None]:
    distributed: Any = importlib.import_module("torch.distributed")
    answer = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = answer


@contextmanager
def _no_scipy() -> Iterator[None]:
    if "scipy" in sys.modules:
        yield
        return
    withheld: Any = None  # what the import system takes for a module that isn't there
    sys.modules["scipy"] = withheld
    try:
        yield
    finally:
        del sys.modules["scipy"]


@contextmanager
def _no_dynamo() -> Iterator[None]:
    """Put modules in dynamo's place whose every name is a decorator that returns what it decorates."""
    stand_in = _Decorators(DYNAMO)
    stand_in.__path__ = []
    indexing = ModuleType(INDEXING)
    indexing.TransformGetItemToIndex = _LateIndexing  # type: ignore[attr-defined]
    sys.modules[DYNAMO], sys.modules[INDEXING] = stand_in, indexing
    try:
        yield
    finally:
        del sys.modules[DYNAMO], sys.modules[INDEXING]
        vars(sys.modules["torch"]).pop("_dynamo", None)


class _Decorators(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Serves both `@decorator` and `@decorator(options)`."""
    return _unchanged if function is None else function


class _LateIndexing:
    """dynamo's context manager of that place, imported when a mask is really made with it."""

    def __new__(cls) -> Any:
        return importlib.import_module(INDEXING).TransformGetItemToIndex()

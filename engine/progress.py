"""How loading tells what it is doing, and other libraries' bars turned into that."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

Progress = Callable[[str, float | None], None]
"""Told a stage of loading and the fraction of it that is done (None where that isn't known)."""


def download_bar(stage: str, progress: Progress) -> Any:
    """A tqdm class for huggingface_hub: it draws nothing and reports the share of the bytes at hand."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm ships no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False, "mininterval": 1.0})

        def display(self, *_: Any, **__: Any) -> bool:
            if self.unit == "B" and self.total:
                progress(stage, min(self.n / self.total, 1.0))
            return True

    return Bar


@contextmanager
def quiet(stage: str | None = None, progress: Progress | None = None) -> Iterator[None]:
    """Keep transformers' warnings and bars off the terminal; its first bar's advance goes to `progress`."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Bar(args[0] if args else kwargs.get("iterable", ()), kwargs.get("total"), stage, progress)

    previous = logging.set_tqdm_hook(hook)
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(previous)


class _Bar:
    """What transformers takes for a tqdm bar; reports at most a hundred times."""

    def __init__(
        self, items: Iterable[Any] | None, total: int | None, stage: str | None, progress: Progress | None
    ) -> None:
        self.items = items if items is not None else ()
        self.total = total or (len(self.items) if isinstance(self.items, Sized) else 0)
        self.stage, self.progress = stage, progress
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        before, self.done = self.done, self.done + count
        if self.progress is None or self.stage is None or not self.total:
            return
        if before * 100 // self.total != self.done * 100 // self.total:
            self.progress(self.stage, min(self.done / self.total, 1.0))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is shown, so nothing is cleared."""

    def set_description(self, *_: object, **__: object) -> None:
        """The stage's name is ours."""

    set_postfix = set_description

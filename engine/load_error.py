"""The one exception that loading raises on purpose."""

from __future__ import annotations

MAX_MESSAGE = 600


class LoadError(Exception):
    """Why a checkpoint can't be served, in one line: what, which file, why, what to do."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…")


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, cut to fit into a line of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__

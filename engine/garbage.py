"""What the collector of cyclic garbage has to look at while an engine steps."""

from __future__ import annotations

import gc


def leave_alone() -> None:
    """Take all objects that there are out of the collector's sight: modules, the model, the engine itself.

    They are some hundred thousand and stay anyway, while a step of many sequences makes enough small objects to
    set the collector off several times. For processes that serve one model till their end: what is garbage now
    stays, too. `gc.unfreeze` undoes it.
    """
    gc.freeze()

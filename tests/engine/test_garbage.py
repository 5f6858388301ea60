"""A server's engine process steps without the collector looking at all that was loaded."""

from __future__ import annotations

import gc

from tokenmill.engine.garbage import leave_alone


def test_what_was_there_is_left_alone_and_what_comes_later_is_not() -> None:
    before = len(gc.get_objects())
    try:
        leave_alone()
        assert len(gc.get_objects()) < before / 10
        late: list[object] = []
        late.append(late)
        assert any(x is late for x in gc.get_objects())
    finally:
        gc.unfreeze()
    assert len(gc.get_objects()) >= before / 2

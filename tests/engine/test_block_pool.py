"""The block pool: sharing, eviction order, and its laws under random histories."""

from __future__ import annotations

import gc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.block_pool import BlockPool

SIZE = 4


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Hold blocks for `tokens` as a sequence does, and name the full ones."""
    prefix = pool.match(tokens, salt)
    blocks = pool.allocate(pool.blocks_for(len(tokens)) - len(prefix.blocks), prefix.blocks)
    assert blocks is not None
    name = prefix.name
    for index in range(len(prefix.blocks), len(tokens) // SIZE):
        name = pool.commit(blocks[index], name, tokens[index * SIZE : (index + 1) * SIZE])
    return blocks


@pytest.mark.parametrize("length", [0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1])
def test_a_match_covers_whole_blocks_and_leaves_a_token(length: int) -> None:
    pool = BlockPool(10, SIZE)
    tokens = list(range(length))
    held = fill(pool, tokens)
    matched = pool.match(tokens).blocks
    assert matched == held[: max(0, (length - 1) // SIZE)]


def test_a_prefix_is_shared_while_held_and_after_release() -> None:
    pool = BlockPool(10, SIZE)
    first = fill(pool, list(range(9)))
    second = fill(pool, [*range(8), 99, 98])
    assert second[:2] == first[:2]
    pool.release(first)
    pool.release(second)
    pool.check_integrity()
    assert pool.match(list(range(9))).blocks == first[:2]
    assert pool.cached_blocks == 2


def test_equal_blocks_after_different_beginnings_are_different_content() -> None:
    pool = BlockPool(10, SIZE)
    fill(pool, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    assert pool.match([2, 2, 2, 2, 5, 5, 5, 5, 0]).blocks == []


def test_salts_do_not_share() -> None:
    pool = BlockPool(10, SIZE)
    fill(pool, list(range(9)), salt="a")
    assert pool.match(list(range(9)), "b").blocks == []
    assert len(pool.match(list(range(9)), "a").blocks) == 2


class Salt(str):
    """A salt whose end can be seen."""


def test_a_salt_lasts_as_long_as_its_contents() -> None:
    pool = BlockPool(4, SIZE)
    alive: weakref.WeakSet[Salt] = weakref.WeakSet()
    for number in range(100):
        salt = Salt(number)
        alive.add(salt)
        pool.release(fill(pool, list(range(2 * SIZE + 1)), salt))
        assert len(pool.match(list(range(2 * SIZE + 1)), salt).blocks) == 2
        pool.check_integrity()
    del salt
    gc.collect()
    assert sorted(alive, key=int) == ["98", "99"], "four blocks hold the contents of two"


def test_content_stays_findable_until_its_block_is_needed() -> None:
    pool = BlockPool(4, SIZE)
    pool.release(fill(pool, list(range(8))))
    taken = pool.allocate(2)
    assert taken is not None
    assert len(pool.match(list(range(9))).blocks) == 2, "empty blocks are taken before cached ones"
    more = pool.allocate(1)
    assert more is not None
    assert len(pool.match(list(range(9))).blocks) == 1, "a sequence's last block goes first"
    pool.check_integrity([taken, more])


def test_history_bounds_what_is_kept_before_new_blocks_are_taken() -> None:
    pool = BlockPool(10, SIZE, history=2)
    prompts = [[10 * i + j for j in range(SIZE)] + [0] for i in range(6)]
    for prompt in prompts:
        pool.release(fill(pool, prompt))
        pool.check_integrity()
    assert [len(pool.match(prompt).blocks) for prompt in prompts] == [0, 0, 0, 0, 1, 1]
    held = pool.allocate(10)
    assert held is not None
    assert sorted(held) == list(range(1, 11)), "all blocks are to be had when they are needed"
    pool.release(held)
    pool.check_integrity()


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4, SIZE)
    shared = fill(pool, list(range(8)))
    pool.release(shared)
    assert pool.allocate(3, shared) is None
    pool.check_integrity()
    assert pool.free_blocks == 4


def test_discarded_content_is_not_found() -> None:
    pool = BlockPool(4, SIZE)
    blocks = fill(pool, list(range(8)))
    pool.discard(blocks)
    assert pool.match(list(range(9))).blocks == []
    pool.check_integrity([blocks])


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often"):
        pool.release(blocks)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_histories_keep_the_laws(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(1, 12)), SIZE, data.draw(st.none() | st.integers(0, 8)))
    tables: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["fill", "release", "discard", "reset"]))
        if action == "fill":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4 * SIZE))
            matched = pool.match(tokens)
            if pool.blocks_for(len(tokens)) <= pool.free_blocks:
                tables.append(fill(pool, tokens))
                assert tables[-1][: len(matched.blocks)] == matched.blocks
        elif action == "release" and tables:
            pool.release(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        elif action == "discard" and tables:
            pool.discard(tables[-1])
        elif action == "reset":
            pool.reset_cache()
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity()
    assert pool.free_blocks == pool.num_blocks

"""KV blocks: who holds them, and which full blocks can serve another request with the same prefix.

A block is in exactly one of four states:

    new       never held; its memory may not even be there yet
    held      references > 0
    cached    references = 0, its content is known and may be taken up again; waits in the free queue
    empty     references = 0, content meaningless; waits at the head of the free queue

A full block's content is named by (name of the block before it, its token ids). Names of contents are
never used twice, and a dict compares the token ids themselves, so two different prefixes can't be taken for
each other however their hashes fall. What stands before a first block is its request's salt: a salt is known
for as long as a content or a sequence names it, and no list of salts grows. The free queue is
least-recently-freed first. New blocks are taken before cached ones, but only until `history` blocks are
cached: a process then stays as large as its work needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

ContentName = int | str
"""Of a content, or, as a text, the salt under which a prompt begins."""
ContentKey = tuple[ContentName, tuple[int, ...]]


@dataclass(slots=True)
class Prefix:
    """Blocks found for the beginning of a prompt, the name of each's content, and what the next one continues."""

    name: ContentName
    blocks: list[int] = field(default_factory=list)
    names: list[ContentName] = field(default_factory=list)

    def cut(self, salt: str, count: int) -> Prefix:
        """The first `count` blocks."""
        names = self.names[:count]
        return Prefix(names[-1] if names else salt, self.blocks[:count], names)


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, numbered from 1 (block 0 is the runner's scratch).

    `history`: free blocks whose contents are kept before new ones are taken; None: as many as there are.
    """

    def __init__(self, num_blocks: int, block_size: int, history: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._history = num_blocks if history is None else history
        self._references = [0] * (num_blocks + 1)
        self._next_new = 1
        self._free: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[ContentKey, int] = {}
        self._content_of: dict[int, tuple[ContentKey, int]] = {}
        self._names = count(1)

    @property
    def free_blocks(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return len(self._free) + self._new_blocks

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - self.free_blocks

    @property
    def _new_blocks(self) -> int:
        return self.num_blocks + 1 - self._next_new

    @property
    def cached_blocks(self) -> int:
        """Free blocks whose content could still be reused."""
        return sum(1 for block in self._content_of if self._references[block] == 0)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def match(self, tokens: Sequence[int], salt: str = "") -> Prefix:
        """The longest cached prefix of `tokens` in whole blocks, leaving at least one token to compute.

        Salts never share.
        """
        prefix = Prefix(salt)
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block = self._block_of.get((prefix.name, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            prefix.blocks.append(block)
            prefix.name = self._content_of[block][1]
            prefix.names.append(prefix.name)
        return prefix

    def allocate(self, amount: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Take hold of the `shared` blocks and of `amount` others; None, with nothing changed, if too few are free."""
        revived = sum(1 for block in shared if self._references[block] == 0)
        if amount > self.free_blocks - revived:
            return None
        for block in shared:
            self.hold(block)
        taken = [self._take() for _ in range(amount)]
        return [*shared, *taken]

    def _take(self) -> int:
        """An empty block, else a new one, else the one that was freed longest ago."""
        oldest = next(iter(self._free), None)
        if oldest is None or (
            self._new_blocks and len(self._free) < self._history and oldest in self._content_of
        ):
            block = self._next_new
            self._next_new += 1
        else:
            block = oldest
            del self._free[block]
            self._forget(block)
        self._references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more reference to a held or cached block."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each; give a sequence's blocks in order: its last ones are reused first."""
        for block in reversed(list(blocks)):
            if self._references[block] <= 0:
                raise ValueError(f"block {block} was released more often than held")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._content_of:
                    self._free.move_to_end(block, last=False)

    def commit(self, block: int, before: ContentName, tokens: Sequence[int]) -> int:
        """Name the content of a held block that is now full; returns the name for the next block to continue.

        When the same content is cached already, that block keeps the name and this one stays private.
        """
        key = (before, tuple(tokens))
        known = self._block_of.get(key)
        if known is not None:
            return self._content_of[known][1]
        self._forget(block)
        name = next(self._names)
        self._block_of[key] = block
        self._content_of[block] = (key, name)
        return name

    def discard(self, blocks: Iterable[int]) -> None:
        """Make the content of these blocks unfindable (their request went wrong); references stay."""
        for block in blocks:
            self._forget(block)

    def reset_cache(self) -> None:
        """Forget every content."""
        self.discard(list(self._content_of))

    def _forget(self, block: int) -> None:
        content = self._content_of.pop(block, None)
        if content is not None:
            del self._block_of[content[0]]

    def check_integrity(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless references equal the occurrences in `tables` and the indices agree."""
        held = [0] * (self.num_blocks + 1)
        for table in tables:
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                assert 1 <= block <= self.num_blocks, f"block {block} doesn't exist"
                held[block] += 1
        assert held == self._references, "references differ from what the tables hold"
        assert set(self._free) == {b for b in range(1, self._next_new) if held[b] == 0}, "free queue"
        assert not any(held[self._next_new :]), "a new block is held"
        assert len(self._block_of) == len(self._content_of), "cache indices differ in size"
        for block, (key, _name) in self._content_of.items():
            assert self._block_of[key] == block, f"content of block {block} is filed elsewhere"
            assert len(key[1]) == self.block_size, f"block {block} was named before it was full"

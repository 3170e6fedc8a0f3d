"""What an encoder has read, kept for the decoder: one place per source, in a pool of blocks of its own.

The keys and values of cross-attention follow from the whole source, so they are computed once, when a sequence is
admitted, and never grow. The completions of one prompt share their blocks by counting holders. Blocks that nobody
holds any more stay known by their source until their room is needed: a sequence that was preempted, or another request
with the same source, finds them again and the encoder does not run. Nothing waits while holding blocks, so a full pool
delays a sequence and never stops all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gristmill.engine.memory.block_pool import BlockPool

_NO_TOKEN = -1
"""Fills the last block of a source, so that blocks can be told apart by what they hold."""


@dataclass(eq=False)
class Source:
    """The tokens that an encoder reads for one sequence, and the blocks with what the decoder's layers made of them."""

    ids: list[int]
    root: bytes | None
    """Known again by this; None: it neither finds nor leaves anything."""
    block_table: list[int] = field(default_factory=list)
    is_read: bool = False
    """Whether the blocks hold their keys and values already."""


class SourcePool:
    """Hands out blocks for sources. caching: let later sequences find what earlier ones have read."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.pool, self.caching = BlockPool(num_blocks, block_size), caching

    @property
    def max_tokens(self) -> int:
        """The longest source that fits."""
        return self.pool.num_blocks * self.pool.block_size

    def hold(self, source: Source) -> bool:
        """Blocks for a source, those that hold it already where there are such. False when too few are free."""
        needed = self.pool.blocks_for(len(source.ids))
        if self.caching and source.root is not None:
            found, _ = self.pool.match(self._filled(source.ids), source.root, needed * self.pool.block_size)
            if len(found) == needed:  # a part is of no use: the encoder reads a source whole
                self.pool.share(found)
                source.block_table, source.is_read = found, True
                return True
        if needed > self.pool.num_free:
            return False
        source.block_table = self.pool.take(needed)
        return True

    def share(self, source: Source) -> Source:
        """The same source for another sequence, in the same blocks."""
        self.pool.share(source.block_table)
        return Source(source.ids, source.root, list(source.block_table), source.is_read)

    def was_read(self, source: Source) -> None:
        """Record that the blocks hold their keys and values; others can find them from now on."""
        if source.is_read:
            return
        source.is_read = True
        if not self.caching or source.root is None:
            return
        size, ids, parent = self.pool.block_size, self._filled(source.ids), source.root
        for number, block in enumerate(source.block_table):
            parent = self.pool.register(block, parent, ids[number * size : (number + 1) * size])

    def release(self, source: Source) -> None:
        """Give the blocks back."""
        self.pool.release(source.block_table)
        source.is_read = False

    def _filled(self, ids: Sequence[int]) -> list[int]:
        return [*ids, *[_NO_TOKEN] * (-len(ids) % self.pool.block_size)]

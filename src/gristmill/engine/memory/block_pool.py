"""The pool of key-value blocks: who holds which, and which hold a known beginning of some text.

A block is free (holds nothing anybody knows), cached (no sequence holds it, but its tokens are known and may come
again) or used (so many sequences hold it). Taking, sharing and giving back cost O(1) a block. A block whose tokens are
all computed can be registered under a hash that chains over everything before it, so that a new sequence finds the
longest beginning it has in common with any earlier one; the blocks it has found are shared, never copied.

Source: Kwon et al. 2023 (PagedAttention); the chained hash is vLLM's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = b""
"""The hash of nothing: what the first block of a sequence is chained to."""


class BlockPool:
    """Hands out block ids 0 ... num_blocks - 1; each holds `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        # a stack whose top is the lowest id: a lone sequence gets consecutive blocks, which read without a gather
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, oldest use first
        self._block_of: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, bytes, array[int]]] = {}  # block: its hash, its parent's, its tokens

    @property
    def num_free(self) -> int:
        """Blocks that can be taken; cached ones lose what they hold when they are."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose tokens are known."""
        return len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks; the caller holds them until `release`. The caller checks `num_free` first."""
        assert count <= self.num_free, "took more blocks than are free"
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that are cached or that others hold already."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give blocks back and empty the caller's list, so that they cannot be given back twice."""
        for block in reversed(blocks):  # the end of a text is evicted before its beginning, without which it is useless
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._content:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        blocks.clear()

    def is_shared(self, block: int) -> bool:
        """True when writing into a block would be seen by another sequence."""
        return self._holders[block] > 1

    def register(self, block: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Make a full block findable; returns its hash, the parent of the next one.

        `parent` is the hash of the block before it, `salt(...)` for the first. When another block holds the same
        already, this one stays private.
        """
        content = array("q", tokens)
        digest = _hash(parent, content)
        if digest not in self._block_of and block not in self._content:
            self._block_of[digest] = block
            self._content[block] = (digest, parent, content)
        return digest

    def match(self, tokens: Sequence[int], parent: bytes, most: int) -> tuple[list[int], list[bytes]]:
        """The longest chain of registered blocks that begins `tokens`, at most `most` tokens: blocks and hashes.

        The caller holds none of them before it calls `share`.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        for start in range(0, most - self.block_size + 1, self.block_size):
            content = array("q", tokens[start : start + self.block_size])
            digest = _hash(parent, content)
            block = self._block_of.get(digest)
            if block is None or self._content[block][1:] != (parent, content):  # two texts of one hash stay apart
                break
            blocks.append(block)
            hashes.append(digest)
            parent = digest
        return blocks, hashes

    def forget_cached(self) -> None:
        """Drop all that is known of blocks; those in use stay with their holders, unknown to newcomers."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._content.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """free + cached + used == total, and each block held by as many tables as it counts. Raises AssertionError."""
        holders = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "blocks leaked, or given back while in use"
        used = [block for block, count in enumerate(holders) if count]
        together = sorted([*self._free, *self._cached, *used])
        assert together == list(range(self.num_blocks)), "free + cached + used is not all blocks, each once"
        assert all(self._content[block][0] in self._block_of for block in self._content), "a hash leads nowhere"
        assert sorted(self._block_of.values()) == sorted(self._content), "hashes and blocks differ"
        assert all(block in self._content for block in self._cached), "a cached block nobody can find"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest, _, _ = self._content.pop(block)
        del self._block_of[digest]
        return block


def salt(*parts: object) -> bytes:
    """The first parent of sequences that may share blocks: same adapter, same tenant. ROOT for none."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest() if parts else ROOT


def _hash(parent: bytes, content: array[int]) -> bytes:
    return hashlib.blake2b(parent + content.tobytes(), digest_size=16).digest()

"""Which replica knows the beginning of a prompt: hashes of whole blocks, of what it was sent last.

All is counted in blocks, so that the balancers of `gristmill.engine.scheduling.balance` apply as they are:
`PrefixAware` sends a prompt to the replica that knows most of it, until the queue there costs more than that saves.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gristmill.engine.scheduling.balance import Worker

BLOCK = 16
"""Tokens of a block."""


def block_hashes(token_ids: Sequence[int], root: str = "") -> tuple[int, ...]:
    """One hash for each whole block, over all that is before it too: equal beginnings have equal hashes.

    root: keeps apart what may not share a cache, as tenants and adapters."""
    chain, hashes = root.encode(), []
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        chain = hashlib.blake2b(chain + array("q", token_ids[start : start + BLOCK]).tobytes(), digest_size=8).digest()
        hashes.append(int.from_bytes(chain))
    return tuple(hashes)


@dataclass(slots=True)
class WarmWorker(Worker):
    """A worker as balancers see it, with the blocks it was sent, `capacity` of them at most."""

    capacity: int = 1024
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def cached(self, prompt: Sequence[int]) -> int:
        """Blocks of the longest beginning of a prompt, given as its block hashes, that it knows."""
        return next((place for place, block in enumerate(prompt) if block not in self.known), len(prompt))

    def remember(self, prompt: Sequence[int]) -> None:
        """It is sent this prompt. Later blocks are forgotten before earlier ones, which they need."""
        for block in reversed(prompt):
            self.known[block] = None
            self.known.move_to_end(block)
        while len(self.known) > self.capacity:
            self.known.popitem(last=False)

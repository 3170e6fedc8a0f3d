"""What proposes drafts: the vocabulary of speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow, unverified.

    `probs` (tokens, vocab) are the distributions they were drawn from; None means that nothing was drawn: each token is
    the only one its proposer would have named (prompt lookup, a greedy draft model).
    """

    token_ids: list[int]
    probs: Tensor | None = None


@dataclass(frozen=True)
class DraftRequest:
    """One sequence that wants a draft. All its tokens but the last have keys and values in the target's cache."""

    slot: int
    """The completion's number in the batch, its own until `Proposer.forget`."""
    token_ids: Sequence[int]
    """Prompt and output so far; between two calls it only grows."""
    limit: int
    """Most tokens wanted."""
    block_table: Sequence[int] = ()
    """Blocks that this sequence may write to behind its last computed token."""
    temperature: float = 0.0
    seed: int = 0
    index: int = 0
    seeded: bool = True
    """The output must be that of its seed, however long drafts are: their tokens are named, not drawn. Drawn ones stand
    more often and give the same distribution, but which tokens come out depends on where drafts begin and end."""

    @property
    def draws(self) -> bool:
        """True when a model is to draw the draft at `temperature`, False when it names the most probable tokens."""
        return self.temperature > 0 and not self.seeded


class Proposer(Protocol):
    """Proposes drafts. Whatever it proposes, verification keeps the target's output; a bad draft only costs time."""

    @property
    def max_tokens(self) -> int:
        """Longest draft."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """One draft per request, of at most its `limit` tokens; it may be empty."""

    def forget(self, slot: int) -> None:
        """The sequence of this slot is finished, aborted or preempted. An unknown slot is ignored."""

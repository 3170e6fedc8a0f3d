"""What the scheduler knows of one completion in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from gristmill.engine.memory.sources import Source


@dataclass(eq=False, kw_only=True)
class Sequence:
    """Tokens, how many of them are computed, and the blocks that hold their keys and values.

    token_ids    [ prompt ........ | output .... ]
    lookahead                                     [ to be verified ]
    computed     [ in the cache ............ ]                        <- num_computed_tokens
    """

    token_ids: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    num_lookahead: int = 0
    """Proposed tokens after them that the next step could verify: it has blocks for them when it is scheduled."""
    num_computed_tokens: int = 0
    """How many tokens have keys and values in the cache."""
    block_table: list[int] = field(default_factory=list)
    """Blocks this sequence holds, in order of position."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of its first blocks, as far as they are full and registered."""
    cache_root: bytes | None = b""
    """What its first block is chained to; None: it neither finds nor leaves anything in the prefix cache."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    arrival: int = 0
    """Order of arrival."""
    arrived_at: float = 0.0
    """Seconds on the engine's clock."""
    priority: int = 0
    """Lower goes first under a priority policy."""
    deadline: float | None = None
    """Seconds on the engine's clock."""
    user: str = ""
    leader: Sequence | None = None
    """Another completion of the same prompt that computes it for both."""
    was_preempted: bool = False
    source: Source | None = None
    """What an encoder reads for it."""

    @property
    def num_missing_tokens(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

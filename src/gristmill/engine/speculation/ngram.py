"""Prompt lookup: what followed the last few tokens when they were last seen is what follows now.

Source: Saxena 2023 (prompt lookup decoding); Yang et al. 2023 (inference with reference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.errors import RequestError


@dataclass
class _Index:
    """Where each n-gram of a sequence last ended, without those that end with its last token: nothing followed yet."""

    size: int = 0
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramProposer:
    """Matches the longest ending of min_n to max_n tokens, at its most recent place in prompt and output.

    Costs a few dictionary entries a token, however long the sequence is; only the first call reads the prompt. Raises
    RequestError, naming the option, for one out of range.
    """

    def __init__(self, *, max_tokens: int = 8, min_n: int = 2, max_n: int = 4) -> None:
        if max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {max_tokens}", field="max_tokens")
        if not 1 <= min_n <= max_n:
            raise RequestError(f"need 1 <= min_n <= max_n, got {min_n} and {max_n}", field="min_n")
        self.max_tokens, self.min_n, self.max_n = max_tokens, min_n, max_n
        self._indices: dict[int, _Index] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Proposer.propose`."""
        return [Draft(self._propose(request)) for request in requests]

    def forget(self, slot: int) -> None:
        """See `Proposer.forget`."""
        self._indices.pop(slot, None)

    def _propose(self, request: DraftRequest) -> list[int]:
        tokens, index = request.token_ids, self._update(request)
        for n in range(min(self.max_n, len(tokens) - 1), self.min_n - 1, -1):
            end = index.ends.get(tuple(tokens[-n:]))
            if end is not None:
                # what follows may run into the ending itself, and then repeats with that period
                period = len(tokens) - end
                limit = min(request.limit, self.max_tokens)
                return [tokens[end + place % period] for place in range(limit)]
        return []

    def _update(self, request: DraftRequest) -> _Index:
        index, tokens = self._indices.setdefault(request.slot, _Index()), request.token_ids
        for end in range(index.size + 1, len(tokens)):
            for n in range(self.min_n, min(self.max_n, end) + 1):
                index.ends[tuple(tokens[end - n : end])] = end
        index.size = max(index.size, len(tokens) - 1)
        return index

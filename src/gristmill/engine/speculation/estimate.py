"""What speculation promises: tokens a round and speed-up from the acceptance rate and the cost of a draft.

The formulas take acceptance for independent from token to token with one rate; `AcceptanceStatistics.tokens_per_round`
is what was measured.

Source: Leviathan et al. 2023, eq. 1 and theorem 3.8.
"""

from __future__ import annotations


def expected_tokens(acceptance: float, draft_tokens: int) -> float:
    """Tokens emitted by a round: (1 - a^(k + 1)) / (1 - a), which is k + 1 for a = 1."""
    return sum(acceptance**place for place in range(draft_tokens + 1))


def speed_up(acceptance: float, draft_tokens: int, cost_ratio: float) -> float:
    """Tokens a round over its cost in steps of the target alone: expected tokens / (c k + 1).

    cost_ratio: what one more drafted token costs, to propose and to check, relative to a step without a draft.
    """
    return expected_tokens(acceptance, draft_tokens) / (cost_ratio * draft_tokens + 1)


def best_length(acceptance: float, cost_ratio: float, longest: int) -> int:
    """The draft length of 0 ... longest with the highest speed-up, the shortest of equal ones; 0: do not draft."""
    return max(range(longest + 1), key=lambda length: speed_up(acceptance, length, cost_ratio))

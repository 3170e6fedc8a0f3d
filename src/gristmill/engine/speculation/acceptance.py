"""How many drafted tokens stood: per request and over all."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.engine.speculation.estimate import expected_tokens


@dataclass
class AcceptanceStatistics:
    """Counts over rounds that had a draft."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tried: int = 0
    """Drafted tokens that were looked at: a round ends at its first rejection."""

    def record(self, drafted: int, accepted: int) -> None:
        """Add a round of `drafted` tokens, the first `accepted` of which stood."""
        if drafted:
            self.rounds += 1
            self.drafted += drafted
            self.accepted += accepted
            self.tried += min(drafted, accepted + 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of the tokens looked at that stood: the formulas' a. NaN before the first round."""
        return self.accepted / self.tried if self.tried else float("nan")

    @property
    def mean_accepted(self) -> float:
        """Tokens that stood per round."""
        return self.accepted / self.rounds if self.rounds else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted per round, the correction or bonus included."""
        return 1 + self.mean_accepted

    @property
    def expected_tokens_per_round(self) -> float:
        """What the measured rate would give if acceptance were independent from token to token, at the mean length.

        More was measured: acceptance comes in runs, as where a text is copied. Less: it falls along the draft.
        """
        if not self.rounds:
            return float("nan")
        low, part = divmod(self.drafted, self.rounds)
        share = part / self.rounds  # between the two whole lengths around the mean
        rate = self.acceptance_rate
        return (1 - share) * expected_tokens(rate, low) + share * expected_tokens(rate, low + 1)

"""How long a draft should be, if any: as long as pays, by what was accepted and what it costs.

Each request has a running estimate of its acceptance rate a, all have a measured cost ratio c; the length is the one
with the highest expected speed-up. It grows when drafts stand and shrinks when they fall early. Where none pays it is
0, and after a while a short draft probes whether that has changed; each failed probe doubles the wait.

Lengths depend on earlier rounds alone, never on the tokens of the draft itself: output stays exact.

Source: Leviathan et al. 2023, theorem 3.8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gristmill.engine.speculation.acceptance import AcceptanceStatistics
from gristmill.engine.speculation.estimate import best_length
from gristmill.engine.speculation.proposer import Draft, DraftRequest, Proposer

_MEMORY = 0.95
"""Weight of the past at each new round, of acceptance as of cost: some twenty rounds are remembered."""
_PRIOR = (1.4, 2.0)
"""Accepted and tried tokens taken for granted at first: a rate of 0.7."""
_PROBE_TOKENS = 2


@dataclass
class CostMeter:
    """Cost of one more drafted token, to propose and to check, relative to a step without drafts.

    A line is fitted to step times over drafted tokens a sequence, older steps fading, for each size of batch (to a
    power of two) apart; until drafts of different lengths were seen, the ratio is `prior`.
    """

    prior: float = 0.1
    _sums: dict[int, tuple[float, float, float, float, float]] = field(default_factory=dict)
    _ratios: dict[int, float] = field(default_factory=dict)

    def observe(self, seconds: float, sequences: int, drafted: int) -> None:
        """A step of `sequences` sequences, none with a prompt, that made and checked `drafted` tokens in all."""
        size, x = sequences.bit_length(), drafted / sequences
        new = (1.0, x, seconds, x * x, x * seconds)
        old = self._sums.get(size, (0.0,) * 5)
        n, sx, sy, sxx, sxy = (_MEMORY * a + b for a, b in zip(old, new, strict=True))
        self._sums[size] = n, sx, sy, sxx, sxy
        spread = sxx / n - (sx / n) ** 2
        if spread > 1e-3:
            slope = (sxy / n - sx * sy / n**2) / spread
            base = (sy - slope * sx) / n
            if base > 0:
                self._ratios[size] = max(0.0, slope / base)

    def ratio(self, sequences: int) -> float:
        """The cost ratio for such a batch."""
        return self._ratios.get(sequences.bit_length(), self.prior)


@dataclass
class _State:
    """What is known of one request."""

    accepted: float = _PRIOR[0]
    tried: float = _PRIOR[1]
    wait: int = 0
    """Proposals left until a probe; 0 while drafting or probing."""
    next_wait: int = 0
    """How long to wait if the probe fails; 0 while not probing."""
    probed: bool = False
    """The probe has been answered."""
    statistics: AcceptanceStatistics = field(default_factory=AcceptanceStatistics)

    @property
    def rate(self) -> float:
        return self.accepted / self.tried


class AdaptiveProposer:
    """A proposer whose drafts have the length that pays; see the module.

    Tell it what came of each draft with `record`, and what steps took with `cost.observe`. adaptive False only counts.
    probe_after: steps without a draft before the first probe, at most 16 times that later. compare_every: one step in
    so many, and the second and fourth of all, is made without drafts, to know what drafts cost; 0 for none.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        adaptive: bool = True,
        cost_ratio: float = 0.1,
        probe_after: int = 16,
        compare_every: int = 64,
    ) -> None:
        self.proposer, self.adaptive = proposer, adaptive
        self.probe_after, self.compare_every = probe_after, compare_every
        self._steps: Counter[int] = Counter()
        self.cost = CostMeter(cost_ratio)
        self.statistics = AcceptanceStatistics()
        self._states: dict[int, _State] = {}

    @property
    def max_tokens(self) -> int:
        """See `Proposer.max_tokens`."""
        return self.proposer.max_tokens

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Proposer.propose`. Call it once a step: the wait for a probe is counted in calls."""
        drafts = [Draft([])] * len(requests)
        if self._compares(len(requests)):
            return drafts
        limits = [min(request.limit, self._length(request.slot, len(requests))) for request in requests]
        wanted = [number for number, limit in enumerate(limits) if limit > 0]
        if wanted:
            proposed = self.proposer.propose([replace(requests[n], limit=limits[n]) for n in wanted])
            for number, draft in zip(wanted, proposed, strict=True):
                drafts[number] = draft
        return drafts

    def record(self, slot: int, drafted: int, accepted: int) -> None:
        """The first `accepted` of a draft of `drafted` tokens stood."""
        if not drafted:
            return
        state = self._states.setdefault(slot, _State())
        for statistics in (self.statistics, state.statistics):
            statistics.record(drafted, accepted)
        state.accepted = _MEMORY * state.accepted + accepted
        state.tried = _MEMORY * state.tried + min(drafted, accepted + 1)
        state.probed = state.next_wait > 0

    def of(self, slot: int) -> AcceptanceStatistics:
        """Counts of one request, until it is forgotten."""
        return self._states.setdefault(slot, _State()).statistics

    def forget(self, slot: int) -> None:
        """See `Proposer.forget`."""
        self._states.pop(slot, None)
        self.proposer.forget(slot)

    def _compares(self, sequences: int) -> bool:
        if not self.adaptive or not self.compare_every:
            return False
        size = sequences.bit_length()  # as CostMeter tells them apart
        self._steps[size] += 1
        return self._steps[size] in (2, 4) or self._steps[size] % self.compare_every == 0

    def _length(self, slot: int, sequences: int) -> int:
        if not self.adaptive:
            return self.max_tokens
        state = self._states.setdefault(slot, _State())
        if state.wait:
            state.wait -= 1
            return 0
        if state.next_wait and not state.probed:
            return min(_PROBE_TOKENS, self.max_tokens)
        length = best_length(state.rate, self.cost.ratio(sequences), self.max_tokens)
        if length > 0:
            state.next_wait = 0
        else:
            wait = state.next_wait or self.probe_after
            state.wait, state.next_wait, state.probed = wait - 1, min(2 * wait, 16 * self.probe_after), False
        return length

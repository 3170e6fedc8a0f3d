"""Who goes first: small rules that order the waiting and the running sequences. The lowest key goes first.

Every key ends with the order of arrival, so that no two sequences are equal. `running_first` decides who gets the token
budget of a step: running sequences go on before new prompts begin (decode first: even gaps between tokens), or new
prompts begin before running ones go on (prefill first: early first tokens and fuller batches).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gristmill.errors import RequestError, closest


class Queued(Protocol):
    """What a policy may know of a sequence."""

    token_ids: list[int]
    arrival: int
    arrived_at: float
    priority: int
    deadline: float | None
    user: str

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt alone."""

    @property
    def num_missing_tokens(self) -> int:
        """Tokens still to compute before the next one can be chosen."""


class Policy(Protocol):
    """Orders sequences."""

    @property
    def running_first(self) -> bool:
        """Whether running sequences get the token budget before waiting ones."""

    def key(self, sequence: Any, now: float) -> Any:
        """The lowest goes first; `now` is in the seconds of `arrived_at`. Must be a total order at any one time."""

    def running_key(self, sequence: Any, now: float) -> Any:
        """The same among running sequences, of which the last is preempted when memory runs out. Which of two goes
        first must never change, or they would preempt each other in turn and none would get on."""

    def serve(self, sequence: Any, tokens: int) -> None:
        """Told by the scheduler that a step computes so many tokens of a sequence."""


class _Rule:
    """A policy that remembers nothing: two sequences always stand in the same order."""

    __slots__ = ()

    def key(self, sequence: Any, now: float) -> Any:
        """See `Policy.key`."""
        raise NotImplementedError

    def running_key(self, sequence: Any, now: float) -> Any:
        """See `Policy.running_key`."""
        return self.key(sequence, now)

    def serve(self, sequence: Queued, tokens: int) -> None:
        """See `Policy.serve`."""


@dataclass(frozen=True, slots=True)
class FirstCome(_Rule):
    """In the order of arrival."""

    running_first: bool = True

    def key(self, sequence: Queued, now: float) -> int:
        """See `Policy.key`."""
        return sequence.arrival


@dataclass(frozen=True, slots=True)
class ShortestFirst(_Rule):
    """Least work first: shortest mean waiting time, at the price of the long ones.

    work: what is expected of a sequence, in tokens; None counts the prompt.
    """

    running_first: bool = True
    work: Callable[[Any], float] | None = None

    def key(self, sequence: Queued, now: float) -> tuple[float, int]:
        """See `Policy.key`."""
        return (sequence.num_prompt_tokens if self.work is None else self.work(sequence), sequence.arrival)


@dataclass(frozen=True, slots=True)
class PriorityFirst(_Rule):
    """Lower `priority` first, ties in the order of arrival.

    ageing: by how much the priority value falls in a second of waiting; above 0 nobody starves, for whoever has waited
    long enough goes before any newcomer.
    """

    running_first: bool = True
    ageing: float = 0.0

    def key(self, sequence: Queued, now: float) -> tuple[float, int]:
        """See `Policy.key`."""
        return (sequence.priority - self.ageing * (now - sequence.arrived_at), sequence.arrival)


@dataclass(frozen=True, slots=True)
class EarliestDeadline(_Rule):
    """Earliest deadline first; who has none goes last, in the order of arrival.

    On one server, if any order meets all deadlines of requests that are there from the start, this one does.
    Source: Jackson 1955.
    """

    running_first: bool = True

    def key(self, sequence: Queued, now: float) -> tuple[float, int]:
        """See `Policy.key`."""
        return (float("inf") if sequence.deadline is None else sequence.deadline, sequence.arrival)


@dataclass(slots=True)
class FairShare:
    """The user who was given the fewest tokens goes first; what runs goes on in the order of arrival."""

    running_first: bool = True
    served: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens computed so far, by user."""

    def key(self, sequence: Queued, now: float) -> tuple[int, int]:
        """See `Policy.key`."""
        return (self.served[sequence.user], sequence.arrival)

    def running_key(self, sequence: Queued, now: float) -> int:
        """See `Policy.running_key`."""
        return sequence.arrival

    def serve(self, sequence: Queued, tokens: int) -> None:
        """See `Policy.serve`."""
        self.served[sequence.user] += tokens


POLICY_NAMES = ("first-come", "shortest", "priority", "deadline", "fair")


def policy_named(name: str, *, prefill_first: bool = False, ageing: float = 0.0) -> Policy:
    """The policy of one of POLICY_NAMES. Raises RequestError for another name, or `ageing` without priorities."""
    running_first = not prefill_first
    if ageing and name != "priority":
        raise RequestError(f"ageing belongs to the policy priority, not to {name}", field="ageing")
    match name:
        case "first-come":
            return FirstCome(running_first)
        case "shortest":
            return ShortestFirst(running_first)
        case "priority":
            return PriorityFirst(running_first, ageing)
        case "deadline":
            return EarliestDeadline(running_first)
        case "fair":
            return FairShare(running_first)
    known = ", ".join(POLICY_NAMES)
    raise RequestError(f"unknown policy {name!r} (known: {known}).{closest(name, POLICY_NAMES)}", field="policy")

"""Which of several workers takes a request. Costs differ widely, so a fixed order leaves workers idle beside queues.

`simulate` runs the policies without a model: each worker serves its requests in order, at its own speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from gristmill.errors import RequestError


@dataclass(frozen=True, slots=True)
class Load:
    """A request: the tokens it costs, when it comes (in ascending order), and its prompt where prefixes are shared."""

    cost: float
    arrives: float = 0.0
    prompt: tuple[int, ...] = ()


@dataclass(slots=True)
class Worker:
    """What a balancer sees of a worker. speed: tokens per second."""

    speed: float = 1.0
    outstanding: float = 0.0
    """Tokens it has still to compute."""
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    """Prompts whose keys and values it keeps."""

    def cached(self, prompt: Sequence[int]) -> int:
        """Tokens of the longest prefix of a prompt that it keeps."""
        return max((_common(prompt, kept) for kept in self.prompts), default=0)


class Balancer(Protocol):
    """Chooses a worker."""

    def choose(self, load: Load, workers: Sequence[Worker]) -> int:
        """The number of the worker that takes a request."""


@dataclass(slots=True)
class RoundRobin:
    """One after the other, whatever they have to do."""

    turn: int = -1

    def choose(self, load: Load, workers: Sequence[Worker]) -> int:
        """See `Balancer.choose`."""
        self.turn = (self.turn + 1) % len(workers)
        return self.turn


@dataclass(frozen=True, slots=True)
class LeastOutstanding:
    """The worker that will be through with what it has first: outstanding tokens over speed."""

    def choose(self, load: Load, workers: Sequence[Worker]) -> int:
        """See `Balancer.choose`."""
        return min(range(len(workers)), key=lambda number: workers[number].outstanding / workers[number].speed)


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """The worker that would be through with the request first, what it keeps of the prompt counted as computed: a
    cached prefix attracts requests until the queue before it costs more than it saves."""

    def choose(self, load: Load, workers: Sequence[Worker]) -> int:
        """See `Balancer.choose`."""

        def through(number: int) -> float:
            worker = workers[number]
            return (worker.outstanding + load.cost - worker.cached(load.prompt)) / worker.speed

        return min(range(len(workers)), key=through)


@dataclass(frozen=True, slots=True)
class Balance:
    """The worker of each request, the tokens each worker computed, and when the last one was through."""

    worker_of: list[int]
    computed: list[float]
    makespan: float


def simulate(loads: Sequence[Load], balancer: Balancer, *, speeds: Sequence[float] = (1.0, 1.0)) -> Balance:
    """Send each request to the worker that the balancer chooses. Raises RequestError for no worker, a speed or cost
    that is not above 0, a prompt longer than its cost, or arrivals out of order."""
    if not speeds or min(speeds) <= 0:
        raise RequestError(f"every worker needs a speed above 0, got {list(speeds)}", field="speeds")
    if any(load.cost <= 0 or len(load.prompt) > load.cost for load in loads):
        raise RequestError("a cost must be above 0 and hold the prompt", field="cost")
    if any(later.arrives < load.arrives for load, later in pairwise(loads)):
        raise RequestError("loads must come in the order of their arrival", field="arrives")
    workers = [Worker(speed) for speed in speeds]
    computed, worker_of, now, makespan = [0.0] * len(workers), [], 0.0, 0.0
    for load in loads:
        for worker in workers:
            worker.outstanding = max(0.0, worker.outstanding - (load.arrives - now) * worker.speed)
        now = load.arrives
        number = balancer.choose(load, workers)
        worker = workers[number]
        cost = load.cost - worker.cached(load.prompt)
        worker.outstanding += cost
        if load.prompt:
            worker.prompts.append(load.prompt)
        worker_of.append(number)
        computed[number] += cost
        makespan = max(makespan, now + worker.outstanding / worker.speed)
    return Balance(worker_of, computed, makespan)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

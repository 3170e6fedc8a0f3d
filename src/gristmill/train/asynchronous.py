"""Asynchronous training, simulated: no worker waits for another, so gradients come late.

A worker reads the weights, takes its time over the gradient, and applies it to whatever the weights have become since.
One worker is plain gradient descent. With N equal ones every gradient is N - 1 updates old, and on a quadratic of
curvature L the rate at which it diverges falls from 2 / L to 1 / L for one update of delay, and on to 0.

Source: Dean et al. 2012 (DistBelief); bound: Arjevani, Shamir and Srebro 2020.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gristmill.errors import GristmillError


@dataclass(frozen=True)
class Update:
    """`weights` after an update; by `worker`, at `time`, with a gradient that was `staleness` updates old."""

    weights: Tensor
    worker: int
    time: float
    staleness: int


def asynchronous_descent(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    learning_rate: float,
    steps: int,
    durations: Sequence[float] = (1.0,),
) -> list[Update]:
    """The first `steps` updates of workers that take `durations` each for a gradient, in order of time, then of worker.

    `gradient` maps weights to their gradient, the same shape. Raises GristmillError for no worker or a duration that
    is not above 0.
    """
    if not durations or min(durations) <= 0.0:
        raise GristmillError(f"durations must be above 0, one for each worker, got {tuple(durations)}")
    weights, updates = start, list[Update]()
    read = dict.fromkeys(range(len(durations)), (weights, 0))
    queue = [(duration, worker) for worker, duration in enumerate(durations)]
    heapq.heapify(queue)
    while len(updates) < steps:
        time, worker = heapq.heappop(queue)
        seen, version = read[worker]
        weights = weights - learning_rate * gradient(seen)
        updates.append(Update(weights, worker, time, len(updates) - version))
        read[worker] = (weights, len(updates))
        heapq.heappush(queue, (time + durations[worker], worker))
    return updates

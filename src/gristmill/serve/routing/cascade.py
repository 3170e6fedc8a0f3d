"""A cheap and a dear model on the same requests: what each threshold of difficulty costs and brings.

A request is answered by the small model unless it is harder than the threshold. In a cascade, difficulty comes from the
small model's own answer, whose cost is then part of every request.
Source: Chen et al. 2023 (FrugalGPT), LLM cascade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.errors import DataError


@dataclass(frozen=True)
class Outcomes:
    """What was measured, one value a request: difficulty in [0, 1], whether each model was right, costs in any unit.

    probe: what it costs to find out the difficulty, on top of the answer; None where the small model's answer tells it,
    which then is kept or paid in vain. Raises DataError for columns of unequal length, or empty ones.
    """

    difficulty: Sequence[float]
    small_right: Sequence[bool]
    large_right: Sequence[bool]
    small_cost: Sequence[float]
    large_cost: Sequence[float]
    probe: Sequence[float] | None = None

    def __post_init__(self) -> None:
        lengths = {len(column) for column in vars(self).values() if column is not None}
        if len(lengths) != 1 or lengths == {0}:
            raise DataError(f"outcomes need columns of one length above 0, got {sorted(lengths)}")


@dataclass(frozen=True)
class Routed:
    """Routing by one threshold: means over the requests, and the standard error of the accuracy."""

    threshold: float
    accuracy: float
    error: float
    cost: float
    to_large: float
    """Share of the requests that the large model answers."""


def route(outcomes: Outcomes, threshold: float) -> Routed:
    """Requests above the threshold go to the large model. Below 0 all do, at 1 and above none."""
    hard = np.asarray(outcomes.difficulty) > threshold
    right = np.where(hard, outcomes.large_right, outcomes.small_right).astype(float)
    small, large = np.asarray(outcomes.small_cost, float), np.asarray(outcomes.large_cost, float)
    if outcomes.probe is None:
        cost = small + hard * large
    else:
        cost = np.asarray(outcomes.probe, float) + np.where(hard, large, small)
    error = float(right.std(ddof=1)) / len(right) ** 0.5 if len(right) > 1 else float("nan")
    return Routed(threshold, float(right.mean()), error, float(cost.mean()), float(hard.mean()))


def curve(outcomes: Outcomes) -> list[Routed]:
    """Every threshold that makes a difference, from all to the large model to none."""
    return [route(outcomes, threshold) for threshold in (-1.0, *sorted(set(outcomes.difficulty)))]


def choose_threshold(outcomes: Outcomes, *, give_up: float = 0.0) -> float:
    """The cheapest threshold whose accuracy is at most `give_up` below the large model's alone. Use requests other than
    those on which the choice is then measured."""
    points = curve(outcomes)
    floor = float(np.mean(np.asarray(outcomes.large_right, float))) - give_up
    good = [point for point in points if point.accuracy >= floor - 1e-12]
    return min(good, key=lambda point: (point.cost, point.threshold)).threshold


def random_accuracy(outcomes: Outcomes, cost: float) -> float:
    """Expected accuracy of sending a random share of the requests to the large model, at this mean cost."""
    small, large = float(np.mean(outcomes.small_cost)), float(np.mean(outcomes.large_cost))
    share = min(1.0, max(0.0, (cost - small) / (large - small)))
    right = np.mean(np.asarray(outcomes.small_right, float)), np.mean(np.asarray(outcomes.large_right, float))
    return float((1 - share) * right[0] + share * right[1])

"""Three ways to find the compute-optimal model size from training runs.

Source: Hoffmann et al. 2022, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.errors import DataError
from gristmill.scale.compute import Allocation
from gristmill.scale.fit import fit_joint_law, fit_power_law
from gristmill.scale.laws import JointLaw, PowerLaw


@dataclass(frozen=True)
class TrainedRun:
    """One model's training: its parameters, and its loss after so many tokens, at least once."""

    parameters: float
    tokens: Sequence[float]
    losses: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.losses) or len(self.tokens) == 0:
            raise DataError(f"a run needs a loss for each of its tokens: {len(self.tokens)} and {len(self.losses)}")


@dataclass(frozen=True)
class OptimalSize:
    """The best parameters and tokens as power laws of compute, through `points` of (FLOP, parameters, loss)."""

    parameters: PowerLaw
    tokens: PowerLaw
    points: tuple[tuple[float, float, float], ...]

    def at(self, flops: float) -> Allocation:
        """The best split of other compute."""
        return Allocation(self.parameters(flops), self.tokens(flops))


def envelope(runs: Sequence[TrainedRun], *, budgets: int = 30) -> OptimalSize:
    """Approach 1: which model's training curve is the lowest at each of `budgets` compute levels.

    Curves are read between their points, never beyond. The levels span the compute at which at least two curves can be
    compared; one that the smallest or the largest model wins is left out, because a better size may lie beyond. Raises
    DataError when curves cannot be compared, or fewer than two sizes in between win.
    """
    curves = [(run, np.argsort(run.tokens)) for run in runs]
    flops = [6 * run.parameters * np.asarray(run.tokens, float)[order] for run, order in curves]
    losses = [np.asarray(run.losses, float)[order] for run, order in curves]
    starts, ends = sorted(float(f[0]) for f in flops), sorted(float(f[-1]) for f in flops)
    if len(runs) < 2 or starts[1] >= ends[-2]:
        raise DataError("the training curves do not overlap in compute: train smaller models longer, larger ones less")
    points = []
    for level in np.geomspace(starts[1], ends[-2], budgets):
        reached = [
            (float(np.interp(np.log(level), np.log(f), y)), run.parameters)
            for (run, _), f, y in zip(curves, flops, losses, strict=True)
            if f[0] <= level * (1 + 1e-12) and level <= f[-1] * (1 + 1e-12)
        ]
        loss, size = min(reached)
        if min(run.parameters for run in runs) < size < max(run.parameters for run in runs):
            points.append((float(level), size, loss))
    if len({size for _, size, _ in points}) < 2:
        raise DataError("fewer than two sizes between the ends are ever the best: add smaller and larger models")
    return _through(points)


def isoflop(runs: Sequence[TrainedRun], *, tolerance: float = 0.02) -> OptimalSize:
    """Approach 2: for each compute budget a parabola of the final loss over log N; its lowest point is the best size.

    Final points whose FLOPs differ by less than `tolerance` are one budget. Raises DataError for a budget of fewer than
    three sizes, one whose parabola has no lowest point between its smallest and largest model, or a single budget.
    """
    finals = sorted((6 * run.parameters * max(run.tokens), run.parameters, _final(run)) for run in runs)
    groups: list[list[tuple[float, float, float]]] = []
    for final in finals:
        if groups and final[0] <= groups[-1][0][0] * (1 + tolerance):
            groups[-1].append(final)
        else:
            groups.append([final])
    points = [_lowest(group) for group in groups]
    if len(points) < 2:
        raise DataError("all runs have the same compute: an exponent needs at least two budgets")
    return _through(points)


def parametric(runs: Sequence[TrainedRun]) -> JointLaw:
    """Approach 3: fit a N^b + c D^d + floor to every final loss. Raises DataError as `fit_joint_law` does."""
    return fit_joint_law(
        [run.parameters for run in runs], [max(run.tokens) for run in runs], [_final(run) for run in runs]
    )


def _final(run: TrainedRun) -> float:
    return float(run.losses[int(np.argmax(run.tokens))])


def _lowest(group: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(FLOP, parameters, loss) at the bottom of one budget's parabola."""
    flops = float(np.mean([flops for flops, _, _ in group]))
    sizes, losses = (np.array([point[column] for point in group]) for column in (1, 2))
    if len(set(sizes)) < 3:
        raise DataError(f"the budget of {flops:.3g} FLOP has {len(set(sizes))} model sizes; a parabola needs three")
    x = np.log(sizes)
    centre = x.mean()
    curvature, slope, level = np.polyfit(x - centre, losses, 2)
    bottom = centre - slope / (2 * curvature) if curvature > 0 else np.inf
    if not x.min() <= bottom <= x.max():
        way = "larger" if slope < 0 else "smaller"
        raise DataError(f"the budget of {flops:.3g} FLOP has no best size between its models: add {way} ones")
    return flops, float(np.exp(bottom)), float(level - slope**2 / (4 * curvature))


def _through(points: Sequence[tuple[float, float, float]]) -> OptimalSize:
    flops = [point[0] for point in points]
    sizes = fit_power_law(flops, [point[1] for point in points])
    tokens = fit_power_law(flops, [point[0] / (6 * point[1]) for point in points])
    return OptimalSize(sizes, tokens, tuple(points))

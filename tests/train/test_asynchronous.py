"""Stale gradients: none is plain descent, one update of delay halves the rate that still converges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.train.asynchronous import asynchronous_descent


def far(curvature: float, rate: float, workers: int, steps: int = 600) -> float:
    """How far from the minimum of curvature / 2 * x^2 the walk from 1 is in the end, at most over ten updates."""
    updates = asynchronous_descent(
        lambda x: curvature * x,
        torch.ones((), dtype=torch.float64),
        learning_rate=rate,
        steps=steps,
        durations=[1.0] * workers,
    )
    return max(abs(update.weights.item()) for update in updates[-10:])


def test_one_worker_is_synchronous_sgd() -> None:
    def gradient(x: Tensor) -> Tensor:
        return x.sin() + 0.1 * x

    start = torch.tensor([1.0, -2.0, 0.3])
    weight = nn.Parameter(start.clone())
    optimiser = torch.optim.SGD([weight], lr=0.3)
    for update in asynchronous_descent(gradient, start, learning_rate=0.3, steps=20):
        weight.grad = gradient(weight.detach())
        optimiser.step()
        assert update.staleness == 0
        torch.testing.assert_close(update.weights, weight.detach())


@given(st.floats(0.1, 10))
def test_a_delay_of_one_diverges_beyond_half_the_rate(curvature: float) -> None:
    assert far(curvature, 0.95 / curvature, workers=2) < 0.1
    assert far(curvature, 1.05 / curvature, workers=2) > 10
    # without delay the bound is 2
    assert far(curvature, 1.95 / curvature, workers=1) < 0.1
    assert far(curvature, 2.05 / curvature, workers=1) > 10


def test_equal_workers_are_late_by_their_number_less_one() -> None:
    updates = asynchronous_descent(torch.clone, torch.ones(1), learning_rate=0.1, steps=12, durations=[1.0] * 4)
    assert [update.staleness for update in updates[3:]] == [3] * 9
    weights = [torch.ones(1), *(update.weights for update in updates)]
    for step in range(4, 12):  # x(t+1) = x(t) - rate * gradient(x(t-3))
        torch.testing.assert_close(weights[step + 1], weights[step] - 0.1 * weights[step - 3])


def test_a_fast_worker_does_not_wait_for_a_slow_one() -> None:
    updates = asynchronous_descent(torch.clone, torch.ones(1), learning_rate=0.01, steps=11, durations=[1.0, 10.5])
    assert [update.worker for update in updates] == [0] * 10 + [1]
    assert updates[-1].staleness == 10
    assert updates[-1].time == 10.5


def test_no_worker_is_refused() -> None:
    for durations in ((), (1.0, 0.0)):
        with pytest.raises(GristmillError, match="durations"):
            asynchronous_descent(torch.clone, torch.ones(1), learning_rate=0.1, steps=1, durations=durations)

"""What a threshold costs and brings; on two trained models a cascade saves cost at the large one's accuracy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.serve.routing.cascade import Outcomes, choose_threshold, curve, random_accuracy, route
from programs import program

FOUR = Outcomes(
    difficulty=[0.1, 0.2, 0.6, 0.9],
    small_right=[True, True, False, False],
    large_right=[True, True, True, False],
    small_cost=[1, 1, 1, 1],
    large_cost=[10, 10, 10, 10],
)


def test_by_hand() -> None:
    at = {point.threshold: (point.accuracy, point.cost, point.to_large) for point in curve(FOUR)}
    assert at == {
        -1.0: (0.75, 11.0, 1.0),
        0.1: (0.75, 8.5, 0.75),
        0.2: (0.75, 6.0, 0.5),
        0.6: (0.5, 3.5, 0.25),
        0.9: (0.5, 1.0, 0.0),
    }
    assert choose_threshold(FOUR) == 0.2
    assert choose_threshold(FOUR, give_up=0.25) == 0.9
    assert random_accuracy(FOUR, 5.5) == pytest.approx(0.625)
    looked = Outcomes(**(vars(FOUR) | {"probe": [0.5] * 4}))
    assert route(looked, 0.2).cost == 0.5 + (1 + 1 + 10 + 10) / 4
    with pytest.raises(DataError):
        Outcomes([0.1], [True], [True, False], [1], [1])


@st.composite
def outcomes(draw: st.DrawFn) -> Outcomes:
    n = draw(st.integers(1, 20))

    def column(values: st.SearchStrategy) -> list:  # type: ignore[type-arg]
        return draw(st.lists(values, min_size=n, max_size=n))

    right, cost = st.booleans(), st.floats(1, 10)
    difficulty = column(st.floats(0, 1))
    return Outcomes(difficulty, column(right), column(right), column(cost), [10 + c for c in column(cost)])


@given(outcomes(), st.floats(0, 0.3))
def test_a_higher_threshold_is_cheaper_and_the_chosen_one_good_enough(found: Outcomes, give_up: float) -> None:
    points = curve(found)
    assert all(a.cost >= b.cost - 1e-9 for a, b in pairwise(points))
    assert (points[0].to_large, points[-1].to_large) == (1.0, 0.0)
    chosen = route(found, choose_threshold(found, give_up=give_up))
    assert chosen.accuracy >= np.mean(found.large_right) - give_up - 1e-9
    assert random_accuracy(found, np.mean(found.large_cost)) == pytest.approx(np.mean(found.large_right))


def test_a_cascade_of_trained_models_saves_at_equal_accuracy() -> None:
    cascade = program("cascade")
    settings = cascade.Settings(digits=2, small=(1, 16), large=(2, 64), steps=200, questions=300)
    report = cascade.compare(settings)
    assert report.large.accuracy > 0.9
    assert report.small.accuracy < report.large.accuracy - 0.2
    assert report.cascade.accuracy >= report.large.accuracy - settings.give_up - 2 * report.cascade.error
    assert report.saved > 0.15
    assert report.random_at_that_cost < report.cascade.accuracy - 2 * report.cascade.error

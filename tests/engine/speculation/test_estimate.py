"""Expected tokens and speed-up, and how measured counts compare with them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.speculation.acceptance import AcceptanceStatistics
from gristmill.engine.speculation.estimate import best_length, expected_tokens, speed_up


def test_worked_numbers() -> None:
    assert expected_tokens(0.8, 5) == pytest.approx(3.6893, abs=5e-5)
    assert speed_up(0.8, 5, 0.05) == pytest.approx(2.9514, abs=5e-5)
    assert speed_up(0.8, 5, 0.1) == pytest.approx(2.4595, abs=5e-5)


@given(st.floats(0, 0.999), st.integers(0, 12), st.floats(0, 2))
def test_closed_form(acceptance: float, length: int, cost: float) -> None:
    closed = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    assert expected_tokens(acceptance, length) == pytest.approx(closed)
    assert speed_up(acceptance, length, cost) == pytest.approx(closed / (cost * length + 1))


def test_limits() -> None:
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens(0.0, 5) == 1
    assert speed_up(0.9, 0, 0.3) == 1


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 12))
def test_the_best_length(low: float, high: float, cost: float, longest: int) -> None:
    low, high = sorted((low, high))
    best = best_length(low, cost, longest)
    assert all(speed_up(low, best, cost) >= speed_up(low, length, cost) for length in range(longest + 1))
    # better drafts are never to be shorter, dearer ones never longer
    assert best <= best_length(high, cost, longest)
    assert best >= best_length(low, cost + 0.1, longest)


def test_a_draft_pays_only_when_it_stands_more_often_than_it_costs() -> None:
    assert best_length(0.3, 0.31, 8) == 0
    assert best_length(0.3, 0.29, 8) == 1
    assert best_length(0.0, 0.0, 8) == 0
    assert best_length(1.0, 0.5, 8) == 8


def test_counts() -> None:
    counts = AcceptanceStatistics()
    assert math.isnan(counts.acceptance_rate)
    assert math.isnan(counts.expected_tokens_per_round)
    for drafted, accepted in ((5, 2), (5, 5), (0, 0), (2, 0)):
        counts.record(drafted, accepted)
    assert (counts.rounds, counts.drafted, counts.accepted, counts.tried) == (3, 12, 7, 3 + 5 + 1)
    assert counts.mean_accepted == pytest.approx(7 / 3)
    assert counts.tokens_per_round == pytest.approx(10 / 3)
    assert counts.acceptance_rate == pytest.approx(7 / 9)


@pytest.mark.parametrize(("acceptance", "length"), [(0.8, 5), (0.4, 3), (0.95, 2)])
def test_independent_acceptance_gives_what_the_formula_says(acceptance: float, length: int) -> None:
    rng, counts = random.Random(0), AcceptanceStatistics()
    for _ in range(20_000):
        stood = 0
        while stood < length and rng.random() < acceptance:
            stood += 1
        counts.record(length, stood)
    assert counts.acceptance_rate == pytest.approx(acceptance, abs=0.01)
    assert counts.tokens_per_round == pytest.approx(expected_tokens(acceptance, length), abs=0.05)
    assert counts.expected_tokens_per_round == pytest.approx(counts.tokens_per_round, abs=0.05)


def test_acceptance_in_runs_gives_more_than_the_formula_says() -> None:
    counts = AcceptanceStatistics()
    for number in range(100):
        counts.record(4, 4 * (number % 2))  # all or nothing
    assert counts.tokens_per_round == 3
    assert counts.expected_tokens_per_round == pytest.approx(expected_tokens(0.8, 4)) == pytest.approx(3.3616)
    mixed = AcceptanceStatistics()
    for drafted in (2, 5):
        mixed.record(drafted, 1)
    assert mixed.expected_tokens_per_round == pytest.approx((expected_tokens(0.5, 3) + expected_tokens(0.5, 4)) / 2)

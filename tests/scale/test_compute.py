"""Splits of compute: closed forms against a numerical minimiser, and the worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from gristmill.errors import DataError, GristmillError
from gristmill.scale.chinchilla import TrainedRun, envelope, isoflop, parametric
from gristmill.scale.compute import compute_optimal, effective_tokens, least_compute, rule_of_thumb
from gristmill.scale.laws import CHINCHILLA


def test_the_rule_of_thumb_on_a_thousand_gpu_hours() -> None:
    flops = 1000 * 3600 * 100e12 * 0.30
    found = rule_of_thumb(flops)
    assert flops == pytest.approx(1.08e20)
    assert (found.parameters, found.tokens) == (pytest.approx(0.949e9, abs=5e5), pytest.approx(19.0e9, abs=5e7))
    assert found.flops == pytest.approx(flops, rel=1e-12)


@given(st.floats(1e12, 1e26), st.floats(1.5, 1e4))
def test_parameters_and_tokens_grow_as_the_root_of_compute(flops: float, factor: float) -> None:
    small, large = rule_of_thumb(flops), rule_of_thumb(factor * flops)
    assert large.parameters / small.parameters == pytest.approx(math.sqrt(factor))
    assert large.tokens / small.tokens == pytest.approx(math.sqrt(factor))


def test_the_best_split_of_the_compute_of_gopher() -> None:
    found = compute_optimal(5.76e23)
    assert found.parameters == pytest.approx(3.2190e10, rel=5e-5)
    assert found.tokens == pytest.approx(2.9823e12, rel=5e-5)
    assert found.loss == pytest.approx(1.930748, abs=5e-7)


@given(st.floats(1e15, 1e26))
def test_the_closed_form_is_where_a_minimiser_ends(flops: float) -> None:
    found = compute_optimal(flops)
    best = minimize_scalar(
        lambda log_n: CHINCHILLA(math.exp(log_n), flops / 6 / math.exp(log_n)),
        bounds=(math.log(1e3), math.log(1e14)),
        options={"xatol": 1e-10},
        method="bounded",
    )
    assert found.loss == pytest.approx(best.fun, rel=1e-9)
    assert math.log(found.parameters) == pytest.approx(best.x, abs=1e-3)


@given(st.floats(1e15, 1e26))
def test_the_least_compute_for_a_loss_inverts_the_best_split(flops: float) -> None:
    loss = compute_optimal(flops).loss
    assert loss is not None
    assert least_compute(loss).flops == pytest.approx(flops, rel=1e-6)


def test_a_loss_below_the_floor_and_no_compute_are_refused() -> None:
    with pytest.raises(GristmillError, match=r"1\.69"):
        least_compute(1.69)
    with pytest.raises(GristmillError, match="flops"):
        rule_of_thumb(0)


def test_repeated_tokens_are_worth_less_and_less() -> None:
    assert effective_tokens(1e9, 5e8) == 5e8
    assert effective_tokens(1e9, 1e9) == 1e9
    worth = [effective_tokens(1.0, epochs) for epochs in (2, 4, 40, 1e6)]
    assert worth == sorted(worth)
    assert 3.5 < worth[1] < 4
    assert worth[3] == pytest.approx(1 + 15.4)


def runs(sizes: np.ndarray, flops: float) -> list[TrainedRun]:
    return [TrainedRun(n, [flops / 6 / n], [CHINCHILLA(n, flops / 6 / n)]) for n in sizes]


def test_all_three_approaches_find_the_exponent_of_the_law() -> None:
    """On data that a law has made, each finds that law's own best sizes."""
    exponent = 0.28 / (0.34 + 0.28)
    levels = np.geomspace(1e19, 1e22, 4)
    around = [compute_optimal(level).parameters * np.geomspace(0.8, 1.25, 5) for level in levels]
    profiles = [run for sizes, level in zip(around, levels, strict=True) for run in runs(sizes, level)]
    parabolas = isoflop(profiles)
    assert parabolas.parameters.b == pytest.approx(exponent, abs=0.005)
    assert parabolas.at(1e21).parameters == pytest.approx(compute_optimal(1e21).parameters, rel=0.02)
    law = parametric(profiles)
    assert (law.a, law.b, law.c, law.d, law.floor) == pytest.approx((406.4, -0.34, 410.7, -0.28, 1.69), rel=1e-4)
    curves = []
    for size in np.geomspace(1e8, 1e11, 60):
        tokens = np.geomspace(0.5, 500, 120) * size
        curves.append(TrainedRun(size, tokens, CHINCHILLA(size, tokens)))
    lowest = envelope(curves)
    assert lowest.parameters.b == pytest.approx(exponent, abs=0.03)
    assert lowest.parameters.b + lowest.tokens.b == pytest.approx(1, abs=1e-9)


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="two budgets"):
        isoflop(runs(compute_optimal(1e20).parameters * np.array([0.5, 1, 2]), 1e20))
    with pytest.raises(DataError, match="add larger ones"):
        isoflop(runs(compute_optimal(1e20).parameters * np.array([0.01, 0.02, 0.04]), 1e20))
    with pytest.raises(DataError, match="do not overlap"):
        envelope([TrainedRun(1e6, [1e6, 2e6], [4, 3]), TrainedRun(1e9, [1e9, 2e9], [3, 2])])

"""Fits give back the constants that the points were made with, and refuse what cannot be fitted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.scale.fit import (
    bootstrap,
    fit_emergence,
    fit_joint_law,
    fit_power_law,
    fit_power_law_with_floor,
    fit_three_phases,
)
from gristmill.scale.laws import CHINCHILLA, EmergenceCurve, JointLaw, PowerLaw, ThreePhaseLaw


def test_a_line_in_logarithms_is_recovered_exactly() -> None:
    x = np.geomspace(10, 1e9, 9)
    law = fit_power_law(x, PowerLaw(2, -0.1)(x))
    assert (law.a, law.b, law.floor) == (pytest.approx(2, rel=1e-12), pytest.approx(-0.1, rel=1e-12), 0)


def test_a_law_with_a_floor_is_recovered() -> None:
    x = np.geomspace(10, 1e6, 12)
    law = fit_power_law_with_floor(x, PowerLaw(10, -0.3, 1.7)(x))
    assert (law.a, law.b, law.floor) == pytest.approx((10, -0.3, 1.7), rel=1e-6)


@settings(max_examples=5, deadline=None)
@given(st.floats(0.5, 50), st.floats(-0.8, -0.1), st.floats(0.2, 3))
def test_any_law_with_a_floor_is_recovered(a: float, b: float, floor: float) -> None:
    x = np.geomspace(1, 1e6, 12)
    law = fit_power_law_with_floor(x, PowerLaw(a, b, floor)(x))
    assert (law.a, law.b, law.floor) == pytest.approx((a, b, floor), rel=1e-3)


def grid() -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e8, 1e11, 5), np.geomspace(1e9, 1e12, 5))
    return n.ravel(), d.ravel()


def constants(law: JointLaw) -> tuple[float, ...]:
    return law.a, law.b, law.c, law.d, law.floor


def test_the_joint_law_is_recovered_from_a_grid() -> None:
    n, d = grid()
    assert constants(fit_joint_law(n, d, CHINCHILLA(n, d))) == pytest.approx(constants(CHINCHILLA), rel=1e-6)


def test_one_broken_run_does_not_bend_the_law() -> None:
    n, d = grid()
    losses = CHINCHILLA(n, d)
    losses[7] *= 1.5
    assert constants(fit_joint_law(n, d, losses)) == pytest.approx(constants(CHINCHILLA), rel=0.03)


def test_three_phases_give_back_slope_and_floor() -> None:
    x = np.geomspace(1e2, 1e8, 25)
    noise = np.exp(np.random.default_rng(0).normal(size=25) * 0.01)
    for factor, tolerance in ((1.0, 1e-9), (noise, 0.03)):
        law = fit_three_phases(x, ThreePhaseLaw(20, -0.25, 0.8, 4.0)(x) * factor)
        assert (law.b, law.floor) == pytest.approx((-0.25, 0.8), rel=tolerance)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 4), st.floats(15, 30))
def test_the_emergence_curve_is_recovered(a: float, middle: float) -> None:
    curve = EmergenceCurve(a, a * middle)
    sizes = np.exp(np.linspace(middle - 3, middle + 3, 8))
    found = fit_emergence(sizes, curve(sizes))
    assert (found.a, found.b) == (pytest.approx(a, rel=1e-6), pytest.approx(a * middle, rel=1e-6))


def test_trials_weigh() -> None:
    sizes, shares = [1e6, 1e7, 1e8], [0.1, 0.9, 0.5]
    heavy = fit_emergence(sizes, shares, [1_000_000, 1_000_000, 1])
    assert heavy(np.array([1e7])) == pytest.approx(0.9, abs=1e-3)


def test_the_band_covers_the_truth_about_as_often_as_it_says() -> None:
    truth, x = PowerLaw(5, -0.1), np.geomspace(1e3, 1e6, 8)
    draw, covered = np.random.default_rng(1), 0
    for seed in range(60):
        y = truth(x) * np.exp(draw.normal(size=8) * 0.02)
        options = {"constants": 2, "samples": 100, "level": 0.9, "seed": seed}
        low, high = bootstrap(fit_power_law, (x, y), ([1e7],), **options)  # type: ignore[arg-type]
        covered += bool(low[0] <= truth(1e7) <= high[0])
    assert 0.75 <= covered / 60 <= 1.0


def test_a_band_of_clean_points_has_no_width_and_scatter_widens_a_real_one() -> None:
    x = np.geomspace(1e3, 1e6, 8)
    clean = PowerLaw(5, -0.1, 1)(x)
    law = fit_power_law_with_floor(x, clean)
    refit = partial(fit_power_law_with_floor, start=law)
    low, high = bootstrap(refit, (x, clean), ([1e8],), law=law, samples=5)
    assert high[0] - low[0] < 1e-6
    noisy = clean * np.exp(np.random.default_rng(0).normal(size=8) * 0.02)
    widths = [np.subtract(*bootstrap(fit_power_law, (x, noisy), ([1e6],), scatter=s)[::-1])[0] for s in (False, True)]
    assert widths[1] > 1.3 * widths[0] > 0


@pytest.mark.parametrize(
    ("fit", "columns", "message"),
    [
        (fit_power_law, ([1, 2], [1, -1]), r"y\[1\]"),
        (fit_power_law, ([1, 1], [1, 2]), "2 different x"),
        (fit_power_law, ([1, 2, 3], [1, 2]), "equally long"),
        (fit_power_law_with_floor, ([1, 2], [2, 1]), "at least 3"),
        (fit_joint_law, ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]), "differ in parameters"),
        (fit_three_phases, ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), "no stretch"),
        (fit_emergence, ([1e6, 1e7], [0, 1]), "threshold"),
        (fit_emergence, ([1e6, 1e7], [0.1, 1.2]), "share"),
    ],
)
def test_what_cannot_be_fitted_is_refused(fit: object, columns: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(*columns)  # type: ignore[operator]

"""Published constants give the published losses; the forms have the limits they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import GristmillError
from gristmill.scale.laws import CHINCHILLA, KAPLAN_PARAMETERS, KAPLAN_TOKENS, BrokenPowerLaw, EmergenceCurve, PowerLaw


@pytest.mark.parametrize(
    ("parameters", "loss"), [(1e8, 2.829963), (1e9, 2.375640), (1e10, 1.994255), (1.75e11, 1.604389), (8.8e13, 1.0)]
)
def test_kaplan_in_parameters(parameters: float, loss: float) -> None:
    assert KAPLAN_PARAMETERS(parameters) == pytest.approx(loss, abs=5e-7)
    assert KAPLAN_PARAMETERS(2 * parameters) / KAPLAN_PARAMETERS(parameters) == pytest.approx(0.948684, abs=5e-7)


@pytest.mark.parametrize(
    ("tokens", "loss"), [(1e9, 2.815642), (1e10, 2.262442), (1e11, 1.817931), (3e11, 1.637762), (1e12, 1.460755)]
)
def test_kaplan_in_tokens(tokens: float, loss: float) -> None:
    assert KAPLAN_TOKENS(tokens) == pytest.approx(loss, abs=5e-7)
    assert KAPLAN_TOKENS(2 * tokens) / KAPLAN_TOKENS(tokens) == pytest.approx(0.936272, abs=5e-7)


@pytest.mark.parametrize(
    ("parameters", "tokens", "loss"),
    [(70e9, 1.4e12, 1.936645), (280e9, 300e9, 1.993258), (7e9, 1e12, 2.051927), (1e9, 20e9, 2.580048)],
)
def test_chinchilla(parameters: float, tokens: float, loss: float) -> None:
    assert CHINCHILLA(parameters, tokens) == pytest.approx(loss, abs=5e-7)


def test_chinchilla_terms_and_that_the_smaller_model_on_more_tokens_wins() -> None:
    assert CHINCHILLA.a * 70e9**CHINCHILLA.b == pytest.approx(0.083487, abs=5e-7)
    assert CHINCHILLA.c * 1.4e12**CHINCHILLA.d == pytest.approx(0.163158, abs=5e-7)
    assert CHINCHILLA(70e9, 1.4e12) < CHINCHILLA(280e9, 300e9)


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.floats(1.1, 100))
def test_the_joint_law_is_separable(parameters: float, tokens: float, factor: float) -> None:
    corners = [CHINCHILLA(n, d) for n in (parameters, factor * parameters) for d in (tokens, factor * tokens)]
    assert corners[0] - corners[1] - corners[2] + corners[3] == pytest.approx(0, abs=1e-9)


def test_the_floor_is_the_limit() -> None:
    assert PowerLaw(10, -0.3, 1.7)(1e60) == pytest.approx(1.7, abs=1e-12)


def test_a_broken_law_without_breaks_is_the_law_with_a_floor() -> None:
    x = np.geomspace(1, 1e9, 20)
    np.testing.assert_allclose(BrokenPowerLaw(1.7, 10, 0.3)(x), PowerLaw(10, -0.3, 1.7)(x), rtol=1e-14)


def test_a_break_changes_the_slope_and_may_turn_it_round() -> None:
    x = np.geomspace(1, 1e8, 200)
    descent = BrokenPowerLaw(0, 1, 0.5, breaks=((-0.8, 1e3, 0.3), (0.7, 1e5, 0.3)))(x)
    slopes = np.gradient(np.log(descent), np.log(x))
    assert slopes[0] == pytest.approx(-0.5, abs=0.01)  # c0
    assert slopes[-1] == pytest.approx(-0.5 + 0.8 - 0.7, abs=0.01)  # c0 + c1 + c2
    assert slopes.max() > 0.1  # double descent: no monotone law can do this
    with pytest.raises(GristmillError, match=r"breaks\[0\]"):
        BrokenPowerLaw(0, 1, 0.5, breaks=((1, 0, 1),))


def test_half_succeed_at_the_half_size() -> None:
    curve = EmergenceCurve(1.3, 27)
    assert curve(np.array([curve.half])) == pytest.approx(0.5)

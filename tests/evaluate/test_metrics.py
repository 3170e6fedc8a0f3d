"""Standard errors are held against simulation, scipy and closed forms."""

import math
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.evaluate.metrics import (
    accuracy,
    bits_per_byte,
    mean,
    paired_difference,
    perplexity,
    ratio,
    wilson_interval,
)


@pytest.fixture(scope="module")
def stats() -> ModuleType:
    """scipy.stats as the oracle, where it is installed."""
    return pytest.importorskip("scipy.stats")


VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


@given(VALUES)
def test_mean_and_its_error_equal_scipy(stats: ModuleType, values: list[float]) -> None:
    estimate = mean(values)
    assert estimate.value == pytest.approx(np.mean(values), abs=1e-6)
    assert estimate.standard_error == pytest.approx(stats.sem(values), abs=1e-6)
    assert estimate.samples == len(values)


def test_accuracy_error_is_the_binomial_one() -> None:
    estimate = accuracy([True] * 30 + [False] * 70)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


@given(VALUES)
def test_z_of_a_paired_difference_is_the_paired_t_statistic(stats: ModuleType, values: list[float]) -> None:
    other = np.random.default_rng(0).normal(size=len(values)).tolist()
    estimate = paired_difference(values, other)
    if estimate.standard_error > 1e-3:
        expected = stats.ttest_rel(values, other).statistic
        assert estimate.value / estimate.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_pairing_removes_the_difficulty_of_the_samples() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(scale=10, size=500)
    a, b = hard + random.normal(size=500) + 0.5, hard + random.normal(size=500)
    assert paired_difference(a, b).standard_error < 0.2 * mean(a).standard_error


def clustered_documents(random: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and bits of documents of very different length, each with its own difficulty."""
    sizes = random.lognormal(6, 1, size=documents).round() + 1
    return sizes * random.normal(2.0, 0.3, size=documents), sizes


def test_ratio_error_is_the_spread_over_simulated_corpora() -> None:
    random = np.random.default_rng(2)
    estimates = [ratio(*clustered_documents(random, 200)) for _ in range(2000)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.07)
    inside = [abs(estimate.value - 2.0) <= 1.96 * estimate.standard_error for estimate in estimates]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.025)


def test_ratio_error_agrees_with_the_bootstrap(stats: ModuleType) -> None:
    bits, sizes = clustered_documents(np.random.default_rng(3), 300)
    boot = stats.bootstrap(
        (bits, sizes),
        lambda y, x, axis: y.sum(axis) / x.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        random_state=np.random.default_rng(4),
        method="percentile",
    )
    assert ratio(bits.tolist(), sizes.tolist()).standard_error == pytest.approx(boot.standard_error, rel=0.1)


@given(VALUES)
def test_a_ratio_over_equal_sizes_is_a_mean(values: list[float]) -> None:
    estimate, expected = ratio(values, [1.0] * len(values)), mean(values)
    assert estimate.value == pytest.approx(expected.value, abs=1e-6)
    assert estimate.standard_error == pytest.approx(expected.standard_error, abs=1e-6)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_scipy(stats: ModuleType, case: tuple[int, int]) -> None:
    successes, samples = case
    low, high = wilson_interval(successes, samples, z=float(stats.norm.ppf(0.975)))
    expected = stats.binomtest(successes, samples).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= low < high <= 1.0
    assert low <= successes / samples <= high


def test_wilson_bounds_solve_the_score_equation() -> None:
    for successes, samples in [(0, 10), (3, 10), (10, 10), (130, 410)]:
        for bound in wilson_interval(successes, samples, z=1.96):
            gap = (successes / samples - bound) ** 2
            assert gap == pytest.approx(1.96**2 * bound * (1 - bound) / samples, abs=1e-12)


def test_uniform_bytes_cost_eight_bits_and_have_perplexity_256() -> None:
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)
    assert perplexity(1000 * math.log(256), 1000) == pytest.approx(256.0)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: mean([]),
        lambda: mean([1.0]),
        lambda: mean([1.0, math.nan]),
        lambda: accuracy([0.5, 1.5]),
        lambda: paired_difference([1.0, 2.0], [1.0]),
        lambda: ratio([1.0, 2.0], [1.0, 2.0, 3.0]),
        lambda: ratio([1.0, 2.0], [0.0, 0.0]),
        lambda: ratio([1.0, 2.0], [2.0, -1.0]),
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(5, 4),
    ],
)
def test_what_has_no_error_is_refused(broken: object) -> None:
    with pytest.raises(DataError):
        broken()  # type: ignore[operator]

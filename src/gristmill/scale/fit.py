"""Fit scaling laws to measured losses, and say how sure the fit is.

A power law alone is a line in logarithms. With a floor the fit is nonlinear: the Huber loss of errors in log loss, so
that one bad run does not bend the law, from many starts, because the problem has several valleys.

Source: Hoffmann et al. 2022, appendix D.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gristmill.errors import DataError, MissingExtra
from gristmill.scale.laws import EmergenceCurve, JointLaw, PowerLaw, ThreePhaseLaw

HUBER = 1e-3
"""Errors of log loss beyond this count linearly."""


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """a x^b by least squares in logarithms. Raises DataError for fewer than two sizes or values not above 0."""
    xs, ys = _checked(2, x=x, y=y)
    b, log_a = np.polyfit(np.log(xs), np.log(ys), 1)
    return PowerLaw(float(np.exp(log_a)), float(b))


def fit_power_law_with_floor(x: Sequence[float], y: Sequence[float], *, start: PowerLaw | None = None) -> PowerLaw:
    """a x^b + floor, from many starts or the one given. Raises DataError for fewer than three sizes, MissingExtra
    without scipy."""
    xs, ys = _checked(3, x=x, y=y)
    centre = float(np.exp(np.log(xs).mean()))  # sizes of about 1 keep a and b apart

    def law(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(p[0] + p[1] * np.log(xs / centre)) + np.exp(p[2]))

    starts = [
        (np.log(ys.mean() * (1 - share)), b, np.log(ys.min() * share))
        for b, share in itertools.product((-0.05, -0.2, -0.5, -1.0), (0.1, 0.5, 0.9))
    ]
    if start is not None:
        starts = [(np.log(start.a) + start.b * np.log(centre), start.b, np.log(start.floor))]
    p = _fit(law, ys, starts)
    return PowerLaw(float(np.exp(p[0]) * centre ** -p[1]), float(p[1]), float(np.exp(p[2])))


def fit_joint_law(
    parameters: Sequence[float], tokens: Sequence[float], loss: Sequence[float], *, start: JointLaw | None = None
) -> JointLaw:
    """a N^b + c D^d + floor, from many starts or the one given. Raises DataError for fewer than five runs or a single
    size or number of tokens, MissingExtra without scipy."""
    n, d, y = _checked(5, parameters=parameters, tokens=tokens, loss=loss)
    for name, values in (("parameters", n), ("tokens", d)):
        if len(set(values)) < 2:
            raise DataError(f"the runs must differ in {name} to tell what they change")
    n0, d0 = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))

    def law(p: np.ndarray) -> np.ndarray:
        by_size = np.exp(p[0] + p[1] * np.log(n / n0))
        return np.asarray(by_size + np.exp(p[2] + p[3] * np.log(d / d0)) + np.exp(p[4]))

    starts = [
        (np.log(y.mean() * (1 - share) / 2), b, np.log(y.mean() * (1 - share) / 2), e, np.log(y.min() * share))
        for b, e, share in itertools.product((-0.1, -0.3, -0.7), (-0.1, -0.3, -0.7), (0.2, 0.7))
    ]
    if start is not None:
        sides = ((start.a, start.b, n0), (start.c, start.d, d0))
        terms = [value for factor, power, middle in sides for value in (np.log(factor) + power * np.log(middle), power)]
        starts = [(*terms, np.log(start.floor))]
    p = _fit(law, y, starts)
    a, c = np.exp(p[0]) * n0 ** -p[1], np.exp(p[2]) * d0 ** -p[3]
    return JointLaw(float(a), float(p[1]), float(c), float(p[3]), float(np.exp(p[4])))


def fit_three_phases(x: Sequence[float], y: Sequence[float]) -> ThreePhaseLaw:
    """The best cut into a flat start, a line in logarithms and a flat end, each at least one, three and one points.

    Raises DataError for fewer than five points, or when the middle does not fall."""
    xs, ys = _checked(5, x=x, y=y)
    order = np.argsort(xs)
    log_x, log_y = np.log(xs[order]), np.log(ys[order])
    best: tuple[float, ThreePhaseLaw] | None = None
    for first, last in itertools.combinations(range(1, len(xs)), 2):
        if last - first < 3:
            continue
        b, log_a = np.polyfit(log_x[first:last], log_y[first:last], 1)
        if b >= 0:
            continue
        ceiling, floor = log_y[:first].mean(), log_y[last:].mean()
        law = ThreePhaseLaw(float(np.exp(log_a)), float(b), float(np.exp(floor)), float(np.exp(ceiling)))
        line = log_a + b * log_x[first:last]
        parts = (log_y[:first] - ceiling, log_y[first:last] - line, log_y[last:] - floor)
        error = sum(float(part @ part) for part in parts)
        if best is None or error < best[0]:
            best = error, law
    if best is None:
        raise DataError("no stretch of three points falls with x: there is no power-law phase to fit")
    return best[1]


def fit_emergence(
    parameters: Sequence[float], success: Sequence[float], trials: Sequence[int] | None = None
) -> EmergenceCurve:
    """sigmoid(a ln N - b), the most likely one of shares of success; `trials` weighs them. Newton's method.

    Raises DataError for shares outside [0, 1], or when the shares are all 0, all 1, or step from 0 to 1 so that no
    finite slope is the best.
    """
    (n,) = _checked(2, parameters=parameters)
    p = np.asarray(success, float)
    if p.shape != n.shape or not ((p >= 0) & (p <= 1)).all():
        raise DataError(f"success must hold a share in [0, 1] for each of the {len(n)} sizes, got {list(success)}")
    if not ((p > 0) & (p < 1)).any():
        raise DataError("no size succeeds sometimes and fails sometimes: there is no curve to fit, only a threshold")
    weights = np.ones_like(p) if trials is None else np.asarray(trials, float)
    x = np.log(n)
    middle, spread = x.mean(), x.std()
    design = np.stack(((x - middle) / spread, np.ones_like(x)), axis=1)
    beta = np.zeros(2)
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (weights * (p - fitted))
        curvature = (design * (weights * fitted * (1 - fitted))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-12 * np.trace(curvature) * np.eye(2), gradient)
        beta = beta + step / max(1.0, float(np.abs(step).max()))  # at most 1 at a time: far steps overshoot
        if np.abs(step).max() < 1e-12:
            break
    a = float(beta[0] / spread)
    return EmergenceCurve(a, float(a * middle - beta[1]))


class _Law(Protocol):
    def __call__(self, *sizes: Any) -> Any: ...


def bootstrap(
    fit: Callable[..., _Law],
    data: Sequence[Sequence[float] | np.ndarray],
    at: Sequence[Sequence[float] | np.ndarray],
    *,
    law: _Law | None = None,
    constants: int = 0,
    scatter: bool = False,
    samples: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of the predictions fit(*data)(*at), in which `level` of the refits lie.

    The last of `data` is the loss. Its relative errors under `law` (the fit when not given), scaled up for the
    `constants` that the fit has spent, are drawn again with replacement and laid on the fitted losses: runs differ in
    their sizes by design, so the runs themselves are not drawn. With `scatter` each prediction is off by one more
    error, as a single further run would be. Returns two arrays shaped like the columns of `at`.

    Source: Efron and Tibshirani 1993, section 9.4 (bootstrapping residuals).
    """
    *sizes, loss = (np.asarray(column, float) for column in data)
    fitted_law = law or fit(*data)
    fitted = np.asarray(fitted_law(*sizes))
    errors = np.log(loss) - np.log(fitted)
    errors = errors * np.sqrt(len(loss) / max(1, len(loss) - constants))
    draw = np.random.default_rng(seed)
    points = [np.asarray(column, float) for column in at]
    found = []
    for _ in range(samples):
        predicted = fit(*sizes, fitted * np.exp(draw.choice(errors, size=len(errors))))(*points)
        found.append(predicted * np.exp(draw.choice(errors, size=predicted.shape)) if scatter else predicted)
    low, high = np.quantile(np.array(found), ((1 - level) / 2, (1 + level) / 2), axis=0)
    return low, high


def _fit(law: Callable[[np.ndarray], np.ndarray], loss: np.ndarray, starts: Sequence[Sequence[float]]) -> np.ndarray:
    """Constants of the start that ends best."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingExtra("scipy", "plan") from error

    def errors(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(law(np.clip(p, -80.0, 80.0))) - np.log(loss))

    rough = [least_squares(errors, start, loss="huber", f_scale=HUBER, max_nfev=60) for start in starts]
    best = sorted(rough, key=lambda fit: float(fit.cost))[:3]
    tight = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "x_scale": "jac"}
    fine = [least_squares(errors, fit.x, loss="huber", f_scale=HUBER, max_nfev=200, **tight) for fit in best]
    return np.asarray(min(fine, key=lambda fit: float(fit.cost)).x)


def _checked(least: int, **columns: Sequence[float]) -> list[np.ndarray]:
    arrays = {name: np.asarray(values, float) for name, values in columns.items()}
    sizes = {len(array) for array in arrays.values()}
    if len(sizes) > 1:
        raise DataError(f"{' and '.join(arrays)} must be equally long, got {[len(a) for a in arrays.values()]}")
    for name, array in arrays.items():
        wrong = ~(np.isfinite(array) & (array > 0))
        if wrong.any():
            raise DataError(f"{name}[{int(wrong.argmax())}] must be a finite number above 0, got {array[wrong][0]}")
    first = next(iter(arrays))
    if len(arrays[first]) < least or (least < 5 and len(set(arrays[first])) < least):
        raise DataError(f"the fit needs at least {least} different {first}, got {sorted(set(arrays[first]))}")
    return list(arrays.values())

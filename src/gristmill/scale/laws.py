"""Scaling laws: test loss, in nats per token, as a function of parameters, tokens or compute.

All are plain functions of arrays or numbers; gristmill.scale.fit finds their constants from measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np

from gristmill.errors import GristmillError


@dataclass(frozen=True)
class PowerLaw:
    """loss = a x^b + floor; b is below 0 where more is better. With floor 0 it is a line in logarithms.

    Source: Hestness et al. 2017; Kaplan et al. 2020; with the irreducible floor, Henighan et al. 2020.
    """

    a: float
    b: float
    floor: float = 0.0

    @overload
    def __call__(self, x: float) -> float: ...
    @overload
    def __call__(self, x: np.ndarray) -> np.ndarray: ...
    def __call__(self, x: float | np.ndarray) -> float | np.ndarray:
        """The loss at size x."""
        return self.a * x**self.b + self.floor


KAPLAN_PARAMETERS = PowerLaw(a=8.8e13**0.076, b=-0.076)
"""Loss of N parameters without the embeddings, data and compute unlimited. Source: Kaplan et al. 2020, eq. 1.1."""
KAPLAN_TOKENS = PowerLaw(a=5.4e13**0.095, b=-0.095)
"""Loss after D tokens, parameters unlimited. Source: Kaplan et al. 2020, eq. 1.2."""


@dataclass(frozen=True)
class ThreePhaseLaw:
    """The learning curve in data: no better than guessing (`ceiling`), then a x^b, then irreducible (`floor`).

    Source: Hestness et al. 2017, figure 6.
    """

    a: float
    b: float
    floor: float
    ceiling: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The loss after x examples."""
        return np.clip(self.a * np.asarray(x, float) ** self.b, self.floor, self.ceiling)


@dataclass(frozen=True)
class JointLaw:
    """loss = a N^b + c D^d + floor, of N parameters and D tokens; b and d are below 0.

    Source: Rosenfeld et al. 2020, eq. 5; its special case: Hoffmann et al. 2022, eq. 10.
    """

    a: float
    b: float
    c: float
    d: float
    floor: float

    @overload
    def __call__(self, parameters: float, tokens: float) -> float: ...
    @overload
    def __call__(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray: ...
    def __call__(self, parameters: float | np.ndarray, tokens: float | np.ndarray) -> float | np.ndarray:
        """The loss of a model of that size after so many different tokens."""
        return self.a * parameters**self.b + self.c * tokens**self.d + self.floor


CHINCHILLA = JointLaw(a=406.4, b=-0.34, c=410.7, d=-0.28, floor=1.69)
"""Source: Hoffmann et al. 2022, eq. 10 (approach 3)."""


@dataclass(frozen=True)
class BrokenPowerLaw:
    """y = a + b x^-c0 * prod_i (1 + (x / d_i)^(1 / f_i))^(-c_i f_i): a power law whose slope changes at each d_i.

    breaks: (c_i, d_i, f_i), the change of slope, where it happens and how softly. A negative c_i bends upwards, so
    the curve may rise again (double descent). Without breaks it is PowerLaw(b, -c0, floor=a).

    Source: Caballero et al. 2023, eq. 1.
    """

    a: float
    b: float
    c0: float
    breaks: tuple[tuple[float, float, float], ...] = ()

    def __post_init__(self) -> None:
        for number, (_, place, softness) in enumerate(self.breaks):
            if place <= 0 or softness <= 0:
                raise GristmillError(f"breaks[{number}]: d and f must be above 0, got {place} and {softness}")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The value at size x."""
        x = np.asarray(x, float)
        y = self.b * x**-self.c0
        for slope, place, softness in self.breaks:
            y = y * (1 + (x / place) ** (1 / softness)) ** (-slope * softness)
        return self.a + y


@dataclass(frozen=True)
class EmergenceCurve:
    """P(success) = sigmoid(a ln N - b): a task that models fail until they are large enough. ln is natural.

    Source: the logistic form of Wei et al. 2022's curves over size.
    """

    a: float
    b: float

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        """Expected share of successes of a model of that size."""
        return np.asarray(1 / (1 + np.exp(self.b - self.a * np.log(np.asarray(parameters, float)))))

    @property
    def half(self) -> float:
        """Size that succeeds half the time."""
        return float(np.exp(self.b / self.a))

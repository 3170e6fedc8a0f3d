"""Figures with their standard errors, in plain formulas.

Samples are taken as independent draws (documents, questions); a standard error says how far the figure would move
with other samples of the same kind, not how far another seed would move it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error and the number of samples behind both."""

    value: float
    standard_error: float
    samples: int


def mean(values: Sequence[float]) -> Estimate:
    """Mean and its standard error, the sample deviation over the root of the count.

    Raises DataError for fewer than two values or one that is not finite.
    """
    array = _finite(values, "values")
    return Estimate(float(array.mean()), float(array.std(ddof=1) / math.sqrt(array.size)), array.size)


def accuracy(correct: Sequence[float]) -> Estimate:
    """Mean of credits in [0, 1]; booleans are the common case. Raises DataError outside that range."""
    if any(not 0.0 <= float(credit) <= 1.0 for credit in correct):
        raise DataError("accuracy: every credit must lie in [0, 1]")
    return mean([float(credit) for credit in correct])


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of a - b over samples that both systems saw, in the same order.

    Where both find the same samples hard, that part of the noise cancels and the error is smaller than the two
    systems' own errors suggest.
    """
    if len(a) != len(b):
        raise DataError(f"paired systems need the same samples, got {len(a)} and {len(b)}")
    return mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).tolist())


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum of numerators over sum of denominators, one pair per document, with its linearised standard error.

    The residuals y - r x of the documents sum to zero; their sample deviation over the mean of x is the delta-method
    error of r, whose bias falls with the number of documents.
    Source: Cochran 1977, Sampling Techniques, 3rd ed., section 6.4 (without the finite-population factor).
    """
    y, x = _finite(numerators, "numerators"), _finite(denominators, "denominators")
    if y.size != x.size:
        raise DataError(f"a ratio needs as many numerators as denominators, got {y.size} and {x.size}")
    if x.min() < 0 or x.sum() <= 0:
        raise DataError("a ratio needs denominators of 0 or more that do not all vanish")
    value = float(y.sum() / x.sum())
    error = float((y - value * x).std(ddof=1) / math.sqrt(x.size) / x.mean())
    return Estimate(value, error, x.size)


def wilson_interval(successes: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a proportion that stay inside [0, 1] and keep a width at 0 and 1; `z` 1.96 covers about 95 %.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if samples < 1 or not 0 <= successes <= samples:
        raise DataError(f"wilson_interval needs 0 <= successes <= samples and a sample, got {successes} of {samples}")
    share = successes / samples
    shrink = 1 / (1 + z * z / samples)
    centre = (share + z * z / (2 * samples)) * shrink
    half = z * shrink * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    # At the ends the bound is exact; rounding must not push it outside.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == samples else centre + half)


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Code length of the text in bits per UTF-8 byte: comparable between tokenizers, unlike perplexity."""
    return total_nats / (math.log(2) * total_bytes)


def perplexity(total_nats: float, tokens: int) -> float:
    """exp of the mean negative log-probability per token; comparable only under one tokenizer."""
    return math.exp(total_nats / tokens)


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        raise DataError(f"{name}: a standard error needs at least two samples, got {array.size}")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise DataError(f"{name}: sample {index} is {array[index]}, not a finite number")
    return array

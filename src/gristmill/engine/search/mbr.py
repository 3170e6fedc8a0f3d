"""Minimum Bayes risk decoding: the output with the least expected loss against the model's own distribution.

The most probable output may be an outlier; the one nearest to all others, by a loss of your choice, rarely is.

Source: Kumar and Byrne 2004.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from gristmill.errors import RequestError

T = TypeVar("T")


@dataclass(frozen=True)
class LeastRisk(Generic[T]):
    """The candidate of least risk, and the risks of all candidates in their order."""

    best: T
    index: int
    risks: list[float]


def minimum_bayes_risk(
    candidates: Sequence[T],
    loss: Callable[[T, T], float],
    *,
    references: Sequence[T] | None = None,
    weights: Sequence[float] | None = None,
) -> LeastRisk[T]:
    """risk(candidate) = sum over references of weight * loss(reference, candidate).

    references: samples, or the support of a posterior; the candidates themselves when None. weights: how likely each
    reference is, made to sum to 1; equal when None, as is right for samples. For a utility pass its negative. Of equal
    risks the first wins. Raises RequestError for no candidates or references, or weights that do not fit them.
    """
    references = candidates if references is None else references
    if not candidates or not references:
        raise RequestError("there is nothing to choose from", field="references" if candidates else "candidates")
    weights = [1.0] * len(references) if weights is None else weights
    if len(weights) != len(references) or min(weights) < 0 or not sum(weights) > 0:
        raise RequestError(
            f"weights must be {len(references)} numbers of 0 or more, one for each reference", field="weights"
        )
    total = sum(weights)
    risks = [
        sum(weight * loss(reference, candidate) for reference, weight in zip(references, weights, strict=True)) / total
        for candidate in candidates
    ]
    index = min(range(len(risks)), key=risks.__getitem__)
    return LeastRisk(candidates[index], index, risks)

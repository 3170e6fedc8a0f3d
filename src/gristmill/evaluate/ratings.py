"""Judgements of people: records, means, and how far the judges agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.errors import DataError
from gristmill.evaluate.metrics import Estimate, mean


@dataclass(frozen=True)
class Rating:
    """One judge's grade of one output in one respect (fluency, coherence, relevance ...)."""

    item: str
    judge: str
    respect: str
    grade: int


def mean_grades(ratings: Sequence[Rating]) -> dict[str, Estimate]:
    """By respect, the mean over items of their mean grade, with its standard error over items.

    Raises DataError when a judge grades an item twice in one respect.
    """
    seen: set[tuple[str, str, str]] = set()
    grades: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rating in ratings:
        key = (rating.item, rating.judge, rating.respect)
        if key in seen:
            raise DataError(f"{rating.judge} grades {rating.respect} of {rating.item} twice")
        seen.add(key)
        grades[rating.respect][rating.item].append(rating.grade)
    return {
        respect: mean([sum(of_item) / len(of_item) for of_item in items.values()]) for respect, items in grades.items()
    }


def cohen_kappa(first: Sequence[int | str], second: Sequence[int | str]) -> float:
    """Agreement of two judges beyond chance on the same items: 1 is full, 0 what chance gives.

    Raises DataError for lists of other lengths or none. Two judges who both give one and the same grade to everything
    agree fully. Source: Cohen 1960.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"two judges need the same items, got {len(first)} and {len(second)}")
    total = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[grade] * theirs[grade] for grade in ours) / total**2
    return 1.0 if chance == 1.0 else (agreed - chance) / (1.0 - chance)

"""Choosing, replacing and refilling spans of a token sequence: the arithmetic that corruptions share.

A span is (start, end), end exclusive; a list of spans is sorted and they do not touch, so that what replaces one is
never beside what replaces the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gristmill.errors import DataError

Span = tuple[int, int]


def share(rate: float, length: int) -> int:
    """`rate` of `length` tokens, rounded, at least one and at most all."""
    return min(max(1, round(rate * length)), length)


def choose_places(generator: np.random.Generator, length: int, rate: float) -> np.ndarray:
    """Sorted places of `share(rate, length)` tokens, uniform over all choices."""
    return np.sort(generator.choice(length, share(rate, length), replace=False))


def choose_spans(
    generator: np.random.Generator, length: int, rate: float, mean_length: float, max_length: int | None = None
) -> list[Span]:
    """Spans that cover exactly `share(rate, length)` of `length` tokens.

    There are as many as make their mean length `mean_length`, fewer where too few tokens would stand between them;
    their lengths and their places are uniform over what is left possible. None is longer than `max_length`.
    Source: Raffel et al. 2020, section 3.3.4; their code always lets a span end the sequence, here it may end before.
    """
    hidden = share(rate, length)
    least = -(-hidden // (max_length or hidden))
    most = length - hidden + 1  # spans that the visible tokens can keep apart
    if least > most:
        raise DataError(
            f"spans of at most {max_length} tokens cannot hide {hidden} of {length}: raise max_length or lower the rate"
        )
    count = min(max(round(hidden / mean_length), least), most)
    return place_spans(generator, length, _parts(generator, hidden, count, max_length))


def place_spans(generator: np.random.Generator, length: int, lengths: Sequence[int]) -> list[Span]:
    """Spans of the given lengths, in this order, uniform over the places where they do not touch."""
    free = length - sum(lengths) - (len(lengths) - 1)  # visible tokens beyond the one between neighbours
    if free < 0:
        raise DataError(f"spans of {list(lengths)} tokens do not fit apart into {length}")
    # choosing which of free + k slots are spans gives every division of the free tokens among the k + 1 gaps
    slots = np.sort(generator.choice(free + len(lengths), len(lengths), replace=False))
    starts = slots + np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64)
    return [(int(start), int(start) + size) for start, size in zip(starts, lengths, strict=True)]


def check_spans(spans: Sequence[Span], length: int) -> None:
    """Raise DataError for spans that are unsorted, touch each other or leave the sequence of `length` tokens."""
    end = -1
    for start, stop in spans:
        if not (end < start <= stop <= length):
            raise DataError(f"spans must be sorted, apart and within {length} tokens, got {list(spans)}")
        end = stop


def between(spans: Sequence[Span], length: int) -> Iterator[Span]:
    """The stretches that the spans leave: before, between and after them, one more than there are spans."""
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), length]
    return zip(starts, ends, strict=True)


def replace_spans(ids: np.ndarray, spans: Sequence[Span], fillers: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """`ids` with the i-th span replaced by the i-th filler. Raises DataError as `check_spans` does."""
    check_spans(spans, len(ids))
    kept = [ids[start:end] for start, end in between(spans, len(ids))]
    parts = [kept[0]]
    for filler, following in zip(fillers, kept[1:], strict=True):
        parts += [np.asarray(filler, np.int64), following]
    return np.concatenate(parts)


def covered(spans: Sequence[Span], length: int) -> np.ndarray:
    """(length,) bool: whether a token lies in a span."""
    found = np.zeros(length, bool)
    for start, end in spans:
        found[start:end] = True
    return found


def _parts(generator: np.random.Generator, total: int, parts: int, most: int | None) -> list[int]:
    """Random positive numbers that sum to `total`; what is above `most` goes to others, one token at a time."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.array([], np.int64)
    sizes = np.diff(np.concatenate(([0], cuts, [total])))
    while most is not None and sizes.max() > most:
        sizes[sizes.argmax()] -= 1
        sizes[generator.choice(np.flatnonzero(sizes < most))] += 1
    return [int(size) for size in sizes]

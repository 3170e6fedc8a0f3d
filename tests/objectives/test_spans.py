"""Choosing spans: how much they cover, that they stay apart, and that no place is preferred."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.spans import (
    check_spans,
    choose_places,
    choose_spans,
    covered,
    place_spans,
    replace_spans,
)

seeds = st.integers(0, 2**32)


@given(seeds, st.integers(1, 80), st.floats(0.01, 0.99), st.floats(1, 12), st.integers(1, 6) | st.none())
def test_spans_cover_the_share_asked_for_apart_and_none_too_long(
    seed: int, length: int, rate: float, mean: float, most: int | None
) -> None:
    hidden = min(max(1, round(rate * length)), length)
    generator = np.random.default_rng(seed)
    if most is not None and -(-hidden // most) > length - hidden + 1:
        with pytest.raises(DataError, match="cannot hide"):
            choose_spans(generator, length, rate, mean, most)
        return
    spans = choose_spans(generator, length, rate, mean, most)
    check_spans(spans, length)
    sizes = [end - start for start, end in spans]
    assert sum(sizes) == hidden == covered(spans, length).sum()
    assert min(sizes) >= 1
    assert most is None or max(sizes) <= most
    wanted = max(1, round(hidden / mean), 0 if most is None else -(-hidden // most))
    assert len(spans) == min(wanted, length - hidden + 1)


def test_places_of_spans_are_uniform() -> None:
    generator = np.random.default_rng(0)
    found = Counter(tuple(place_spans(generator, 6, [1, 2])) for _ in range(6000))
    # the two need one token between: 2 free tokens in 3 gaps, 6 ways
    assert len(found) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


def test_two_out_of_three_tokens_are_chosen_uniformly() -> None:
    generator = np.random.default_rng(0)
    found = Counter(tuple(choose_places(generator, 3, 0.5).tolist()) for _ in range(3000))
    assert found.keys() == {(0, 1), (0, 2), (1, 2)}
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 13.8


@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_fillers_take_the_place_of_spans_and_nothing_else_moves(
    seed: int, lengths: list[int], sizes: list[int]
) -> None:
    ids = np.arange(30)
    spans = place_spans(np.random.default_rng(seed), 30, lengths)
    fillers = [[100 + number] * size for number, size in zip(range(len(spans)), sizes, strict=False)]
    noisy = replace_spans(ids, spans, fillers)
    expected = ids.tolist()
    for (start, end), filler in reversed(list(zip(spans, fillers, strict=True))):
        expected[start:end] = filler
    assert noisy.tolist() == expected


def test_unfit_spans_are_refused() -> None:
    for spans in ([(0, 2), (2, 3)], [(3, 4), (1, 2)], [(2, 9)], [(2, 1)], [(-1, 1)]):
        with pytest.raises(DataError, match="sorted, apart and within 8"):
            check_spans(spans, 8)
    with pytest.raises(DataError, match="do not fit apart into 3"):
        place_spans(np.random.default_rng(0), 3, [1, 2])

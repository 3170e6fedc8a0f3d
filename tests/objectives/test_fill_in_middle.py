"""Filling in the middle: both orders, what is learned, and that the text can be put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.objectives.fill_in_middle import FillInMiddle, MiddleTokens, infill_prompt, move_middle
from gristmill.tokens.batch import IGNORED

MARKS = MiddleTokens(prefix=90, suffix=91, middle=92, end=93)
PRE, SUF, MID, END = 90, 91, 92, 93


def test_both_orders() -> None:
    text = np.array([1, 2, 3, 4, 5])
    assert move_middle(text, 1, 3, "psm", MARKS).tolist() == [PRE, 1, SUF, 4, 5, MID, 2, 3, END]
    assert move_middle(text, 1, 3, "spm", MARKS).tolist() == [PRE, SUF, 4, 5, MID, 1, 2, 3, END]
    for order in ("psm", "spm"):
        prompt: list[int] = infill_prompt([1], [4, 5], order, MARKS)
        assert [*prompt, 2, 3, END] == move_middle(text, 1, 3, order, MARKS).tolist()


def restored(ids: list[int]) -> list[int]:
    """The text without marks, its middle back in place; in spm the middle follows the prefix anyway."""
    marked = {mark: ids.index(mark) for mark in (PRE, SUF, MID)}
    last = ids[marked[MID] + 1 : -1]
    if marked[SUF] == 1:
        return [*last, *ids[2 : marked[MID]]]
    return [*ids[1 : marked[SUF]], *last, *ids[marked[SUF] + 1 : marked[MID]]]


@given(st.lists(st.integers(0, 89), min_size=1, max_size=30), st.booleans(), st.integers(0, 1000))
def test_the_text_can_be_put_together_again(text: list[int], ended: bool, key: int) -> None:
    batch = FillInMiddle(MARKS, rate=1.0).prepare([(text + [END] * ended, None)], [(key,)])
    ids = batch.input_ids.tolist()
    assert restored(ids) == text
    assert ids.count(END) == 1
    assert ids[-1] == END
    assert len(ids) == len(text) + FillInMiddle.extra_tokens
    assert (batch.target_ids != IGNORED).sum() == len(ids) - 1  # every token but the first is learned


def test_shares_of_moved_texts_and_of_the_two_orders() -> None:
    text: Any = (np.arange(20), None)
    keys = [(0, number) for number in range(2000)]
    batch = FillInMiddle(MARKS, rate=0.8, spm_share=0.25).prepare([text] * 2000, keys)
    pieces = [piece.tolist() for piece in batch.input_ids.split(batch.segment_lengths)]
    moved = [piece for piece in pieces if PRE in piece]
    assert all(piece == list(range(20)) for piece in pieces if PRE not in piece)
    assert len(moved) / 2000 == pytest.approx(0.8, abs=0.03)
    # without a prefix, in 9.3% of the texts, both orders are the same
    spm = sum(piece[1] == SUF for piece in moved) / len(moved)
    assert spm == pytest.approx(0.25 + 0.75 * 0.093, abs=0.03)


def test_a_rate_of_zero_is_causal_language_modelling() -> None:
    batch = FillInMiddle(MARKS, rate=0.0).prepare([([1, 2, 3], None)], [(0,)])
    assert batch.input_ids.tolist() == [1, 2, 3]


def test_unfit_texts_and_options_are_refused() -> None:
    for rate in (0.0, 1.0):
        with pytest.raises(DataError, match="token 91 at 1 is kept for marks of infilling"):
            FillInMiddle(MARKS, rate=rate).prepare([([1, 91, 2], None)], [(0,)])
    with pytest.raises(DataError, match="a loss mask has no meaning"):
        FillInMiddle(MARKS).prepare([([1, 2], [1, 1])], [(0,)])
    with pytest.raises(DataError, match="middle 2:9 does not lie in a text of 3"):
        move_middle(np.arange(3), 2, 9, "psm", MARKS)
    for options in ({"rate": 1.5}, {"spm_share": -0.1}):
        with pytest.raises(DataError, match=next(iter(options))):
            FillInMiddle(MARKS, **options)

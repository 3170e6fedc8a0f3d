import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.corpus.packing import pack
from gristmill.errors import DataError


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    row_length=st.integers(1, 40),
    seed=st.integers(0, 5),
    window=st.integers(1, 50),
)
def test_every_token_stands_in_one_row_and_no_row_overflows(lengths, row_length, seed, window):
    packing = pack(lengths, row_length, seed=seed, window=window)
    rows = list(packing)
    found = sorted((document, token) for row in rows for document, start, end in row for token in range(start, end))
    assert found == [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    fill = [sum(end - start for _, start, end in row) for row in rows]
    assert all(0 < length <= row_length for length in fill)
    assert packing.tokens == sum(lengths)
    assert packing.utilisation == sum(fill) / (len(rows) * row_length)
    again = pack(lengths, row_length, seed=seed, window=window)
    assert list(again) == rows


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), row_length=st.integers(5, 30))
def test_is_best_fit_decreasing(lengths, row_length):
    """Rows are filled as by a plain search for the fullest row with room."""
    pieces = [row_length] * sum(length // row_length for length in lengths)
    pieces += [length % row_length for length in lengths if length % row_length]
    room: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [left for left in room if left >= piece]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - piece)
        else:
            room.append(row_length - piece)
    filled = [sum(end - start for _, start, end in row) for row in pack(lengths, row_length, seed=0)]
    assert sorted(filled) == sorted(row_length - left for left in room)


def test_only_documents_longer_than_a_row_are_cut():
    packing = pack([3, 25, 10], 10, seed=0)
    pieces = sorted(piece for row in packing for piece in row)
    assert pieces == [(0, 0, 3), (1, 0, 10), (1, 10, 20), (1, 20, 25), (2, 0, 10)]


def test_real_lengths_pack_almost_fully():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 5000).astype(int) + 1
    assert pack(lengths, 512, seed=0).utilisation > 0.98


def test_seeds_give_other_rows():
    lengths = list(range(1, 100))
    assert list(pack(lengths, 128, seed=0)) != list(pack(lengths, 128, seed=1))


def test_refusals():
    with pytest.raises(
        DataError, match="2 documents are longer than a row of 4 tokens, the longest is document 2 with 9"
    ):
        pack([4, 5, 9], 4, seed=0, long_documents="refuse")
    with pytest.raises(DataError, match="document 1 has no tokens"):
        pack([4, 0], 4, seed=0)
    with pytest.raises(DataError, match="no documents to pack"):
        pack([], 4, seed=0)
    with pytest.raises(DataError, match="row_length and window"):
        pack([1], 0, seed=0)
    with pytest.raises(IndexError, match="row 1 of 1"):
        pack([4], 4, seed=0)[1]

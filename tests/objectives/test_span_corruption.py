"""T5's span corruption: the worked sentence byte for byte, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from gristmill.errors import DataError
from gristmill.objectives.sequence_pair import Framing, Pair
from gristmill.objectives.span_corruption import SpanCorruption, sentinel_ids, sentinel_spans, splice
from gristmill.tokens.tokenizer import Tokenizer
from objectives.words import PUPPIES, SENTINELS, ids, show, text

MARKS = tuple(range(1000, 1100))
FRAMING = Framing.t5(1100)


def test_the_worked_sentence() -> None:
    source, target = sentinel_spans(ids(PUPPIES), [(3, 4), (5, 7)], SENTINELS)
    assert show(Pair(source, target)) == (
        "[CLS] The puppies are [X] outside [Y] .",
        "<s> [X] frolicking [Y] the house",
        "[X] frolicking [Y] the house [Z]",
    )
    assert text(splice(source, target, SENTINELS)) == PUPPIES


@given(
    st.integers(0, 2**32),
    st.integers(1, 120),
    st.floats(0.05, 0.6),
    st.floats(1, 10),
    st.integers(10, 20) | st.none(),
)
def test_splicing_the_target_back_gives_the_text(
    seed: int, length: int, rate: float, mean: float, most: int | None
) -> None:
    objective = SpanCorruption(FRAMING, MARKS, rate=rate, mean_length=mean, max_length=most)
    clean = np.random.default_rng(seed).integers(2, 1000, size=length)
    pair = objective.pair((clean, None), np.random.default_rng(seed))
    source, target = np.asarray(pair.source), np.asarray(pair.target)
    assert splice(source, target, MARKS).tolist() == clean.tolist()
    spans = int((source >= 1000).sum())
    assert source[source >= 1000].tolist() == list(MARKS[:spans])
    assert target[target >= 1000].tolist() == list(MARKS[: spans + 1])
    assert target[-1] >= 1000
    assert (target < 1000).sum() == max(1, round(rate * length))
    assert max(len(source), len(target)) + 1 <= length + objective.extra_tokens


def test_the_published_defaults_hide_fifteen_percent_in_spans_of_three() -> None:
    pair = SpanCorruption(FRAMING, MARKS).pair((np.arange(2, 402), None), np.random.default_rng(0))
    target = np.asarray(pair.target)
    assert (target < 1000).sum() == 60
    assert (target >= 1000).sum() == 21


def test_a_batch_depends_on_the_keys_and_refuses_masks() -> None:
    objective = SpanCorruption(FRAMING, MARKS)
    texts = [(np.arange(2, 40), None), (np.arange(50, 90), None)]
    together = objective.prepare(texts, [(0, 1), (0, 2)])
    alone = objective.prepare(texts[1:], [(0, 2)])
    assert together.source.input_ids[-alone.source.tokens :].tolist() == alone.source.input_ids.tolist()
    with pytest.raises(DataError, match="a loss mask has no meaning"):
        objective.prepare([(np.arange(5), np.ones(5))], [(0,)])


def test_what_cannot_be_told_apart_or_spelt_is_refused() -> None:
    with pytest.raises(DataError, match="token 1003 at 1 is kept for a sentinel"):
        sentinel_spans(np.array([5, 1003]), [(0, 1)], MARKS)
    with pytest.raises(DataError, match="2 spans need 3 sentinels, there are 2"):
        sentinel_spans(np.arange(9), [(0, 1), (3, 4)], MARKS[:2])
    source, target = sentinel_spans(np.arange(9), [(0, 1), (3, 4)], MARKS)
    for broken in (target[:-1], target[1:], np.roll(target, 2), target[:0]):
        with pytest.raises(DataError, match="not those of the source"):
            splice(source, broken, MARKS)
    for options in ({"rate": 0.0}, {"rate": 1.0}, {"mean_length": 0.5}, {"max_length": 2}):
        with pytest.raises(DataError, match=next(iter(options))):
            SpanCorruption(FRAMING, MARKS, **options)


def test_sentinels_of_a_tokenizer_in_their_order() -> None:
    backend = Backend(WordLevel({"a": 0, "<extra_id_1>": 1, "<extra_id_0>": 2, "<extra_id_3>": 3}))
    assert sentinel_ids(Tokenizer(backend)) == (2, 1)
    with pytest.raises(DataError, match="has no sentinels"):
        sentinel_ids(Tokenizer(Backend(WordLevel({"a": 0}))))


@pytest.mark.peer
def test_the_first_sentinel_is_extra_id_0_of_t5() -> None:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -1.0)]
    theirs = T5Tokenizer(vocab=pieces, extra_ids=100)
    marks = sentinel_ids(Tokenizer(theirs.backend_tokenizer))
    assert theirs.convert_ids_to_tokens(marks) == [f"<extra_id_{i}>" for i in range(100)]

"""Counted language models: worked numbers, sums to one, the oracle of another library, real text."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import assets
from gristmill.corpus.sources import read_text
from gristmill.errors import DataError, RequestError
from gristmill.objectives.ngram import NGram
from gristmill.tokens.words import split_words

texts = st.lists(st.text("abc", max_size=12), min_size=1, max_size=6)
smoothings = st.sampled_from([{}, {"add": 1.0}, {"add": 0.1}, {"discount": 0.75}, {"discount": 0.3}])


def test_worked_bigram() -> None:
    plain = NGram(2, "ab").fit(["ababa"])
    assert plain.probability("b", "a") == plain.probability("a", "b") == 1.0
    assert NGram(2, "ab", add=1).fit(["ababa"]).probability("b", "a") == 3 / 4


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 4), smoothings, st.booleans())
def test_every_conditional_sums_to_one(sequences: list[str], order: int, smoothing: dict, end: bool) -> None:
    model = NGram(order, "abcd.", end="." if end else None, **smoothing).fit(sequences)
    for context in itertools.product([None, *"abd"], repeat=order - 1):
        found = [model.probability(token, context) for token in "abcd."]
        assert math.isclose(sum(found), 1.0, rel_tol=1e-9)
        assert all(value > 0 for value in found) or not smoothing


@settings(max_examples=40, deadline=None)
@given(texts.filter(any))
def test_entropy_of_the_training_text_does_not_rise_with_the_order(sequences: list[str]) -> None:
    found = [NGram(order, "abc").fit(sequences).cross_entropy(sequences) for order in range(1, 7)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found))


def test_cross_entropy_is_the_empirical_entropy() -> None:
    text = "abracadabra"
    followers = Counter(itertools.pairwise([None, *text]))
    before = Counter([None, *text][:-1])
    expected = -sum(count * math.log(count / before[left]) for (left, _), count in followers.items()) / len(text)
    assert NGram(2, set(text)).fit([text]).cross_entropy([text]) == pytest.approx(expected, rel=1e-12)


SENTENCES = (
    "i love you . you love me . i eat food . you eat good food . we go north . i love good food . the pen is here . "
    "we eat here . she goes north"
)


@pytest.mark.parametrize("smoothing", [{"add": 0.1}, {"discount": 0.75}])
def test_a_well_formed_sentence_is_more_probable(smoothing: dict[str, float]) -> None:
    sentences = [sentence.split() for sentence in SENTENCES.split(" . ")]
    model = NGram(2, {*SENTENCES.split(), "</s>"} - {"."}, end="</s>", **smoothing).fit(sentences)
    assert model.logprob(["i", "love", "you"]) > model.logprob(["eat", "pen", "north"]) > -math.inf


def test_kneser_ney_by_hand() -> None:
    """Two levels and the uniform floor, written out: "c" occurs more often than "b", after fewer tokens."""
    model = NGram(2, "abc", discount=0.5).fit(["acac", "abb", "ac"])
    types = {"a": 2, "b": 2, "c": 1}  # before a: begin, c; before b: a, b; before c: a
    single = {token: (count - 0.5 + 0.5 * 3 / 3) / 5 for token, count in types.items()}
    assert model.probability("c", "a") == pytest.approx((3 - 0.5 + 0.5 * 2 * single["c"]) / 4)
    assert model.probability("a", "a") == pytest.approx(0.5 * 2 * single["a"] / 4)
    assert model.probability("b", "b") == pytest.approx(1 - 0.5 + 0.5 * single["b"])
    assert single["b"] > single["c"]


def test_beginnings_keep_their_counts_in_shorter_contexts() -> None:
    """Nothing can stand before a beginning, so the shorter table counts how often, not after how many."""
    model = NGram(3, "ab", discount=0.5).fit(["ab", "ab", "ba"])
    assert model.tables[1][(None,)] == {"a": 2, "b": 1}
    assert model.tables[1][("a",)] == {"b": 1}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"order": 0}, "order"),
        ({"add": -1.0}, "add"),
        ({"discount": 1.0}, "discount"),
        ({"discount": 0.5, "add": 1.0}, "discount"),
        ({"end": "z"}, "end"),
        ({"unknown": "z"}, "unknown"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        NGram(**{"order": 2, "vocabulary": "ab", **options})
    assert caught.value.field == field


def test_bad_data_is_refused() -> None:
    with pytest.raises(DataError, match="'z'"):
        NGram(2, "ab").fit(["az"])
    with pytest.raises(DataError, match="pad with None"):
        NGram(3, "ab").probability("a", "b")
    with pytest.raises(DataError, match="no token"):
        NGram(2, "ab").perplexity([""])
    assert NGram(2, "ab?", unknown="?").fit(["az"]).probability("y", "a") == 1.0
    assert NGram(2, "ab").fit(["ab"]).perplexity(["ba"]) == math.inf


@pytest.mark.peer
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("add", [0.0, 1.0, 0.1])
def test_perplexity_is_that_of_nltk(order: int, add: float) -> None:
    lm = pytest.importorskip("nltk.lm")
    from nltk.util import ngrams

    def padded(sentence: list[str]) -> list[tuple[str, ...]]:
        return list(ngrams(["<s>"] * (order - 1) + [*sentence, "</s>"], order))

    train = [sentence.split() for sentence in SENTENCES.split(" . ")]
    theirs = lm.MLE(order) if add == 0 else lm.Lidstone(add, order)
    theirs.fit([padded(sentence) for sentence in train], [*itertools.chain(*train), "<s>", "</s>"])
    ours = NGram(order, theirs.vocab, add=add, end="</s>", unknown="<UNK>").fit(train)
    held_out = train[:3] if add == 0 else [["you", "love", "the", "food"], ["me", "eat", "cats"]]
    expected = theirs.perplexity([event for sentence in held_out for event in padded(sentence)])
    assert ours.perplexity(held_out) == pytest.approx(expected, rel=1e-9)
    for token in theirs.vocab:
        context = ["i", "love"][: order - 1]
        assert ours.probability(token, context) == pytest.approx(theirs.score(token, context))


@pytest.mark.asset
def test_shakespeare() -> None:
    """Letters grow more predictable with each one known, and Kneser-Ney reads new words better than add-k."""
    # of every play there is a second edition in old spelling (_f): held-out text must not be among the rest in that
    plays = [one.text for one in read_text(assets.get("shakespeare")) if one.id.endswith("_gut.txt")][:5]
    letters = [[c for c in " ".join(split_words(text)).lower() if c.isalpha() or c == " "] for text in plays[:2]]
    alphabet = {letter for text in letters for letter in text}
    bits = [NGram(n, alphabet).fit(letters).cross_entropy(letters) / math.log(2) for n in (1, 2, 3, 4)]
    assert 3.9 < bits[0] < 4.3
    assert all(later < earlier - 0.3 for earlier, later in itertools.pairwise(bits))
    words = [split_words(text.lower()) for text in plays]
    vocabulary = {"?", *(word for text in words[:-1] for word in text)}
    bigrams, trigrams = (
        [NGram(order, vocabulary, unknown="?", **how).fit(words[:-1]) for how in ({"add": 0.01}, {"discount": 0.75})]
        for order in (2, 3)
    )
    found = [model.perplexity(words[-1:]) for model in (*bigrams, *trigrams)]
    assert found[1] < 0.7 * found[0]
    assert found[3] < 0.3 * found[2]
    assert found[3] < 1.1 * found[1]  # add-k gets worse with each word of context, this hardly
    assert found[2] > 2 * found[0]

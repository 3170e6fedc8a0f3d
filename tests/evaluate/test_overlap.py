"""Overlap with a reference, repetition, robustness to disturbed inputs, judges."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import DataError
from gristmill.evaluate.overlap import distinct_n, exact_match, token_f1
from gristmill.evaluate.ratings import Rating, cohen_kappa, mean_grades
from gristmill.evaluate.robustness import counterfactual_gap, replaced, robustness, shuffled_blocks, typos, unchanged


def test_worked_f1() -> None:
    assert token_f1("the cat sat", "the cat sat down", articles=True) == pytest.approx(0.8571, abs=1e-4)
    assert token_f1("the cat sat", "the cat sat down") == pytest.approx(0.8)  # two of two and two of three words
    assert token_f1("A dog!", "dog") == 1.0
    assert token_f1("", "dog") == token_f1("dog", "") == 0.0
    assert token_f1("the", "a") == 1.0
    assert exact_match("The Seine.", ["Rhone", "seine"])
    assert not exact_match("The Seine, I think", ["seine"])


@given(*[st.lists(st.sampled_from(["cat", "sat", "on", "mat"]), min_size=1, max_size=8)] * 2)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(answer: list[str], reference: list[str]) -> None:
    left = list(reference)
    common = sum(1 for word in answer if word in left and not left.remove(word))  # type: ignore[func-returns-value]
    precision, recall = common / len(answer), common / len(reference)
    wanted = 2 * precision * recall / (precision + recall) if common else 0.0
    assert token_f1(" ".join(answer), " ".join(reference)) == pytest.approx(wanted)


def test_distinct_runs_of_words() -> None:
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b", "b a"], 2) == 1.0  # no run crosses from one text to the next
    with pytest.raises(DataError, match="3 words"):
        distinct_n(["a b"], 3)


def share_with_mill(texts: Sequence[str]) -> float:
    return sum("mill" in text for text in texts) / len(texts)


def test_what_disturbed_inputs_cost() -> None:
    texts = ["the old mill stands here", "a wheel and a mill", "no wheel at all"] * 20
    found = robustness(share_with_mill, texts, {"none": unchanged, "typos": lambda t, r: typos(t, r, rate=0.9)})
    assert found.deltas["none"] == 0.0
    assert found.deltas["typos"] < 0
    assert found == robustness(share_with_mill, texts, {"none": unchanged, "typos": lambda t, r: typos(t, r, rate=0.9)})
    with pytest.raises(DataError):
        robustness(share_with_mill, [], {})


@given(st.text(alphabet="abcdefg \n", max_size=60), st.randoms())
def test_typos_keep_the_letters_and_shuffles_keep_the_blocks(text: str, choose: random.Random) -> None:
    assert sorted(typos(text, choose)) == sorted(text)
    assert sorted(shuffled_blocks(text, choose).split("\n\n")) == sorted(text.split("\n\n"))
    assert shuffled_blocks(text, choose).split("\n\n")[-1] == text.split("\n\n")[-1]


def test_a_judge_that_sees_no_group_has_no_gap() -> None:
    swap = replaced({"he": "she"})
    pairs = [(text, swap(text, random.Random(0))) for text in ("he mends sacks", "then he sleeps")]
    assert pairs[0][1] == "she mends sacks"
    assert counterfactual_gap(lambda text: float(len(text.split())), pairs) == 0.0
    assert counterfactual_gap(lambda text: float("she" in text), pairs) == 1.0


def test_judges() -> None:
    grades = [Rating("a", "x", "fluency", 4), Rating("a", "y", "fluency", 2), Rating("b", "x", "fluency", 5)]
    assert mean_grades(grades)["fluency"].value == pytest.approx(4.0)
    with pytest.raises(DataError, match="twice"):
        mean_grades([*grades, grades[0]])
    assert cohen_kappa([1, 2, 3, 1], [1, 2, 3, 1]) == 1.0
    assert cohen_kappa([1, 1, 2, 2], [1, 2, 1, 2]) == 0.0
    assert cohen_kappa(["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15) == pytest.approx(0.4)
    with pytest.raises(DataError):
        cohen_kappa([1], [1, 2])


@pytest.mark.peer
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=20))
def test_kappa_is_that_of_nltk(grades: list[tuple[int, int]]) -> None:
    agreement = pytest.importorskip("nltk.metrics.agreement")
    first, second = ([grade[judge] for grade in grades] for judge in (0, 1))
    if len({*first, *second}) == 1:
        return  # no disagreement is possible: theirs divides by zero
    triples = [(judge, item, grade[judge]) for item, grade in enumerate(grades) for judge in (0, 1)]
    assert cohen_kappa(first, second) == pytest.approx(agreement.AnnotationTask(triples).kappa_pairwise(0, 1))

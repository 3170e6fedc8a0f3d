"""Minimum Bayes risk: the worked example, the limit of 0-1 loss, samples and posteriors."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.search.toys import END, B, X, garden_path
from gristmill.engine.search.exhaustive import exhaustive_search
from gristmill.engine.search.mbr import minimum_bayes_risk
from gristmill.engine.search.single_path import sample_outputs
from gristmill.errors import RequestError

POSTERIOR = {1: 0.3, 2: 0.3, 10: 0.4}


def absolute(reference: float, candidate: float) -> float:
    return abs(reference - candidate)


def unequal(reference: object, candidate: object) -> float:
    return float(reference != candidate)


def test_the_worked_example() -> None:
    found = minimum_bayes_risk(list(POSTERIOR), absolute, weights=list(POSTERIOR.values()))
    assert found.risks == pytest.approx([3.9, 3.5, 5.1])
    assert (found.best, found.index) == (2, 1)
    assert max(POSTERIOR, key=POSTERIOR.__getitem__) == 10


def test_with_0_1_loss_it_is_the_most_probable_output() -> None:
    found = minimum_bayes_risk(list(POSTERIOR), unequal, weights=list(POSTERIOR.values()))
    assert found.best == 10
    every = exhaustive_search(garden_path(), [0], 4)
    outputs = [tuple(result.token_ids) for result in every]
    weights = [math.exp(result.logprob) for result in every]
    assert minimum_bayes_risk(outputs, unequal, weights=weights).best == (B, X, END)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_samples_count_as_often_as_they_were_drawn(samples: list[int]) -> None:
    candidates = sorted(set(samples))
    drawn = minimum_bayes_risk(candidates, absolute, references=samples)
    counted = minimum_bayes_risk(candidates, absolute, weights=[samples.count(c) for c in candidates])
    assert drawn.risks == pytest.approx(counted.risks)
    assert min(drawn.risks) == drawn.risks[drawn.index]


def test_over_samples_of_a_model() -> None:
    samples = [tuple(r.token_ids) for r in sample_outputs(garden_path(), [0], 4, 400, seed=0)]
    by_tokens = minimum_bayes_risk(
        sorted(set(samples)), lambda a, b: sum(x != y for x, y in zip(a, b, strict=True)), references=samples
    )
    # x comes in .69 of all outputs and a in .6: the nearest to all is `ax`, though `bx` is the most probable
    assert by_tokens.best == (0, X, END)


@pytest.mark.parametrize(
    ("field", "candidates", "options"),
    [
        ("candidates", [], {}),
        ("references", [1], {"references": []}),
        ("weights", [1, 2], {"weights": [1.0]}),
        ("weights", [1, 2], {"weights": [1.0, -0.5]}),
        ("weights", [1, 2], {"weights": [0.0, 0.0]}),
    ],
)
def test_refuses_what_has_no_risk(field: str, candidates: list[int], options: dict[str, list[float]]) -> None:
    with pytest.raises(RequestError) as caught:
        minimum_bayes_risk(candidates, absolute, **options)  # type: ignore[arg-type]
    assert caught.value.field == field

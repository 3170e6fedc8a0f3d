"""Penalised objectives in every search: worked numbers, no effect at weight 0, less penalty with more weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.paging import paged, prompt
from engine.search.test_beam import twin
from engine.search.toys import random_toy
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.driver import log_probability
from gristmill.engine.search.exhaustive import exhaustive_search
from gristmill.engine.search.penalised import (
    occurrences,
    of_each_token,
    only,
    penalised,
    penalised_score,
    repetitions,
)
from gristmill.engine.search.single_path import greedy_search, sample_outputs
from gristmill.errors import RequestError

WEIGHTS = [0.0, 0.2, 0.5, 1.0, 3.0, 20.0]


def count(phrase: Sequence[int], ids: Sequence[int]) -> int:
    return sum(list(ids[i : i + len(phrase)]) == list(phrase) for i in range(len(ids)))


def test_the_penalty_is_taken_from_the_log_probability() -> None:
    first, second = (0.30, 0.1), (0.28, 0.0)
    assert penalised_score(math.log(first[0]), first[1], 0.5) == pytest.approx(-1.2540, abs=1e-4)
    assert penalised_score(math.log(second[0]), second[1], 0.5) == pytest.approx(-1.2730, abs=1e-4)
    raw = [p - 0.5 * penalty for p, penalty in (first, second)]
    assert raw == pytest.approx([0.25, 0.28])  # by probability the second would win


def test_the_search_ranks_by_the_log_form() -> None:
    toy = random_toy(2, seed=0)
    toy.chances = lambda ids: [0.30, 0.28, 0.42]
    toy.vocab_size, toy.end_ids = 3, frozenset({0, 1})
    penalty = of_each_token(lambda _, ids: {0: 0.1, 1: 0.0, 2: 9.0}[ids[-1]], 3)
    found = greedy_search(toy, [0], 1, objective=penalised(penalty, 0.5))
    assert found is not None
    assert found.token_ids == [0]
    assert found.score == pytest.approx(-1.2540, abs=1e-4)
    assert found.logprob == pytest.approx(math.log(0.3))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_weight_of_zero_changes_no_search(seed: int) -> None:
    toy = random_toy(5, seed)
    free = penalised(lambda *_: torch.full((5,), math.inf), 0.0)
    params = BeamSearchParams(width=3, n=3, max_tokens=5)
    assert greedy_search(toy, [0], 5, objective=free) == greedy_search(toy, [0], 5)
    assert beam_search(toy, [0], params, objective=free) == beam_search(toy, [0], params)
    assert sample_outputs(toy, [0], 5, 4, seed=seed, objective=free) == sample_outputs(toy, [0], 5, 4, seed=seed)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_more_weight_never_means_more_penalty_at_the_optimum(seed: int) -> None:
    toy = random_toy(4, seed)

    def penalty(_: Sequence[int], ids: Sequence[int]) -> float:
        return len(ids) - len(set(ids)) + 0.3 * abs(len(ids) - 3)

    found = [
        exhaustive_search(toy, [0], 4, objective=penalised(of_each_token(penalty, 4), weight))[0] for weight in WEIGHTS
    ]
    penalties = [penalty([0], result.token_ids) for result in found]
    assert penalties == sorted(penalties, reverse=True)
    for result, weight in zip(found, WEIGHTS, strict=True):
        assert result.score == pytest.approx(result.logprob - weight * penalty([0], result.token_ids), abs=1e-6)


def test_soft_constraints_are_violated_less_as_the_weight_grows() -> None:
    totals = []
    unwanted = [[1], [2, 0]]
    for weight in WEIGHTS:
        objective = penalised(occurrences(unwanted, 5), weight)
        found = [
            exhaustive_search(random_toy(5, seed), [0], 3, objective=objective, complete_only=False)[0]
            for seed in range(30)
        ]
        totals.append(sum(count(phrase, result.token_ids) for result in found for phrase in unwanted))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[2] > totals[-1] == 0


def test_soft_constraints_work_in_a_beam_of_the_engine() -> None:
    ids, params = prompt(6), BeamSearchParams(width=4, max_tokens=6, ignore_eos=True)
    with paged() as model:
        (free,) = beam_search(model, ids, params)
        unwanted = [free.token_ids[:1], free.token_ids[2:4]]
        (kept,) = beam_search(model, ids, params, objective=penalised(occurrences(unwanted, 300), 100.0))
    assert any(count(phrase, free.token_ids) for phrase in unwanted)
    assert not any(count(phrase, kept.token_ids) for phrase in unwanted)


@pytest.mark.parametrize(
    ("penalty", "whole"),
    [
        (repetitions(5), lambda ids: len(ids) - len(set(ids))),
        (occurrences([[1, 1], [3], [0, 1, 0]], 5), lambda ids: sum(count(p, ids) for p in ([1, 1], [3], [0, 1, 0]))),
    ],
)
def test_each_token_s_penalty_is_that_of_the_whole_output(penalty: Any, whole: Any) -> None:
    slow = of_each_token(lambda _, ids: whole(ids), 5)
    for ids in ([], [1], [0, 1], [1, 1, 1], [0, 1, 0, 1, 3]):
        assert torch.equal(penalty([], ids), slow([], ids))


def test_a_hard_constraint_holds_and_keeps_the_ratios_of_what_is_allowed() -> None:
    toy = random_toy(5, seed=6)

    def allowed(ids: Sequence[int]) -> list[int]:
        return [0, 2] if len(ids) % 2 == 0 else [1, 3, 4]

    free = {tuple(r.token_ids): r.logprob for r in exhaustive_search(toy, [0], 4, complete_only=False)}
    bound = exhaustive_search(toy, [0], 4, complete_only=False, objective=only(allowed, log_probability))
    fitting = [ids for ids in free if all(token in allowed(ids[:i]) for i, token in enumerate(ids))]
    assert [tuple(r.token_ids) for r in bound] == fitting
    assert all(r.score == r.logprob == free[tuple(r.token_ids)] for r in bound)


@pytest.mark.peer
def test_a_hard_constraint_in_a_beam_equals_transformers() -> None:
    ids = prompt(7, 2)

    def allowed(length: int) -> list[int]:
        return list(range(length % 3, 300, 3))

    theirs = twin().generate(
        torch.tensor([ids]),
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=-1,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda _, sofar: allowed(len(sofar) - len(ids)),
        return_dict_in_generate=True,
        output_scores=True,
    )
    with paged() as model:
        params = BeamSearchParams(width=4, n=4, max_tokens=6)
        ours = beam_search(model, ids, params, objective=only(lambda sofar: allowed(len(sofar)), log_probability))
    assert [r.token_ids for r in ours] == theirs.sequences[:, len(ids) :].tolist()
    assert [r.score for r in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        penalised(repetitions(3), -1.0)
    assert caught.value.field == "weight"

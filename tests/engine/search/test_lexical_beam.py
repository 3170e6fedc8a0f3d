"""Required phrases are in every output, and the beam around them is still a good one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.paging import paged, prompt
from engine.search.toys import garden_path, random_toy
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.driver import Search, run
from gristmill.engine.search.exhaustive import exhaustive_search
from gristmill.engine.search.lexical_beam import lexical, tokens_missing
from gristmill.errors import RequestError

phrases = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1, max_size=3)


def holds(ids: Sequence[int], phrase: Sequence[int]) -> bool:
    return any(list(ids[i : i + len(phrase)]) == list(phrase) for i in range(len(ids)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), required=phrases, width=st.integers(1, 5), spare=st.integers(0, 3))
def test_every_output_holds_every_phrase(seed: int, required: list[list[int]], width: int, spare: int) -> None:
    toy = random_toy(6, seed)
    limit = sum(map(len, required)) + spare
    params = BeamSearchParams(width=width, n=width, max_tokens=limit, required=required)
    found = beam_search(toy, [0], params)
    assert found
    for result in found:
        assert all(holds(result.token_ids, phrase) for phrase in required)
        assert len(result.token_ids) <= limit
        assert result.logprob == pytest.approx(toy.logprob(result.token_ids), abs=1e-5)
        assert not set(result.token_ids[:-1]) & toy.end_ids
    assert not toy.live


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_wide_beam_finds_the_best_output_that_holds_them(seed: int) -> None:
    toy, required = random_toy(4, seed), [[0, 1], [2]]
    every = exhaustive_search(toy, [0], 5, complete_only=False)
    fitting = [result for result in every if all(holds(result.token_ids, phrase) for phrase in required)]
    params = BeamSearchParams(width=300, max_tokens=5, required=required, length_penalty=0.0, early_stopping="never")
    (found,) = beam_search(toy, [0], params)
    assert found.token_ids == fitting[0].token_ids


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 4))
def test_without_phrases_it_is_beam_search(seed: int, width: int) -> None:
    toy = random_toy(6, seed)
    search = Search(prompt_ids=[0], prune=lexical(width, []), max_tokens=5, end_ids=toy.end_ids, keep=width)
    run(toy, [search])
    params = BeamSearchParams(width=width, n=width, max_tokens=5, length_penalty=0.0, early_stopping="never")
    best = beam_search(toy, [0], params)[0]
    assert search.results(1)[0].token_ids == best.token_ids


def test_unlikely_phrases_come_in_a_real_model() -> None:
    ids, required = prompt(8, 3), [[11, 13, 17], [291]]
    with paged(end_ids=range(0, 300, 30)) as model:
        params = BeamSearchParams(width=4, n=4, max_tokens=10, required=required)
        found = beam_search(model, ids, params)
    assert len(found) == 4
    assert all(holds(result.token_ids, phrase) for result in found for phrase in required)


def test_tokens_missing_counts_what_the_end_of_an_output_has_begun() -> None:
    wanted = [(1, 2, 3), (4,)]
    assert tokens_missing([], wanted) == 4
    assert tokens_missing([1, 2], wanted) == 2
    assert tokens_missing([1, 2, 1], wanted) == 3  # begun again
    assert tokens_missing([4, 1, 2, 3], wanted) == 0
    assert tokens_missing([1, 1, 2], [(1, 1, 2)]) == 0


def test_an_impossible_phrase_gives_no_output() -> None:
    assert beam_search(garden_path(), [0], BeamSearchParams(width=2, max_tokens=3, required=[[3, 2]])) == []


@pytest.mark.parametrize("token", [-1, 6, 5])
def test_a_token_that_cannot_be_within_an_output_is_refused(token: int) -> None:
    params = BeamSearchParams(width=2, max_tokens=4, required=[[0, token]])
    with pytest.raises(RequestError) as caught:
        beam_search(random_toy(6, seed=0), [0], params)
    assert caught.value.field == "required"

"""One driver, several prunes: greedy, sampling, beam and exhaustive search on toys whose answers are known."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.search.toys import END, A, B, X, Y, garden_path, random_toy, table
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.driver import Search, run
from gristmill.engine.search.exhaustive import exhaustive_search, search_errors
from gristmill.engine.search.prune import best, everything, sample, top
from gristmill.engine.search.single_path import greedy_search, sample_outputs
from gristmill.errors import RequestError


def test_a_path_adds_up_its_log_probabilities() -> None:
    cats, are, playful, stop = range(4)
    toy = table(
        {
            (): [0.5, 0.5, 0, 0],
            (cats,): [0, 0.4, 0.6, 0],
            (cats, are): [0.75, 0, 0.25, 0],
            (cats, are, playful): [0.2, 0, 0, 0.8],
        },
        vocab_size=4,
        end=stop,
    )
    found = {tuple(result.token_ids): result for result in exhaustive_search(toy, [0], 4)}
    assert found[cats, are, playful, stop].logprob == pytest.approx(-3.2189, abs=1e-4)
    assert math.exp(found[cats, are, playful, stop].logprob) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("vocab", "depth", "levels", "complete"),
    [(3, 3, (3, 6, 12), 7), (4, 3, (4, 12, 36), 13), (5, 4, (5, 20, 80, 320), 85)],
)
def test_the_tree_has_as_many_nodes_as_it_must(vocab: int, depth: int, levels: tuple[int, ...], complete: int) -> None:
    toy = random_toy(vocab, seed=3)
    found = exhaustive_search(toy, [0], depth)
    assert found[0].cost.levels == levels
    assert len(found) == complete == sum((vocab - 1) ** (i - 1) for i in range(1, depth + 1))
    assert Counter(len(result.token_ids) for result in found) == {
        i: (vocab - 1) ** (i - 1) for i in range(1, depth + 1)
    }
    assert toy.rows == found[0].cost.expanded == sum((vocab - 1) ** i for i in range(depth))
    assert toy.forwards == found[0].cost.forwards == depth


def test_complete_outputs_and_cut_ones_share_all_probability() -> None:
    found = exhaustive_search(random_toy(4, seed=1), [0], 3, complete_only=False)
    complete = [result for result in found if result.finish_reason == "stop"]
    cut = [result for result in found if result.finish_reason == "length"]
    assert len(cut) == 27
    assert all(len(result.token_ids) == 3 for result in cut)
    assert sum(math.exp(result.logprob) for result in complete) < 1
    assert sum(math.exp(result.logprob) for result in found) == pytest.approx(1, abs=1e-6)


def test_exhaustive_search_is_brute_force() -> None:
    toy = random_toy(3, seed=5)
    outputs = [(*head, 2) for size in range(3) for head in itertools.product(range(2), repeat=size)]
    assert len(outputs) == 7
    brute = sorted(outputs, key=toy.logprob, reverse=True)
    found = exhaustive_search(toy, [0], 3)
    assert [tuple(result.token_ids) for result in found] == brute
    for result in found:
        assert result.logprob == result.score == pytest.approx(toy.logprob(result.token_ids), abs=1e-5)


def test_exhaustive_search_refuses_a_forest() -> None:
    with pytest.raises(RequestError, match="max_tokens") as caught:
        exhaustive_search(random_toy(50, seed=0), [0], 10)
    assert caught.value.field == "max_tokens"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 4), vocab=st.integers(2, 4), depth=st.integers(1, 4))
def test_no_decoder_beats_the_optimum_and_all_scores_can_be_added_up_again(
    seed: int, width: int, vocab: int, depth: int
) -> None:
    toy = random_toy(vocab, seed)
    optimum = exhaustive_search(toy, [0], depth)[0].logprob
    whole = exhaustive_search(toy, [0], depth, complete_only=False)[0].logprob
    params = BeamSearchParams(width=width, n=width, max_tokens=depth, length_penalty=0.0)
    results = beam_search(toy, [0], params) + sample_outputs(toy, [0], depth, 3, seed=seed)
    greedy = greedy_search(toy, [0], depth)
    assert greedy is not None
    for result in [*results, greedy]:
        assert result.logprob <= (optimum if result.finish_reason == "stop" else whole) + 1e-9
        assert result.logprob == pytest.approx(toy.logprob(result.token_ids), abs=1e-5)
        ended = result.token_ids[-1] in toy.end_ids
        assert result.finish_reason == ("stop" if ended else "length")
        assert ended or len(result.token_ids) == depth
    assert not toy.live


def test_greedy_search_misses_the_best_output() -> None:
    toy = garden_path()
    found = greedy_search(toy, [0], 5)
    assert found is not None
    assert found.token_ids == [A, X, END]
    assert found.finish_reason == "stop"
    assert math.exp(found.logprob) == pytest.approx(0.33)
    assert greedy_search(toy, [0], 5) == found
    every = {tuple(result.token_ids): math.exp(result.logprob) for result in exhaustive_search(toy, [0], 5)}
    assert every == pytest.approx({(B, X, END): 0.36, (A, X, END): 0.33, (A, Y, END): 0.27, (B, Y, END): 0.04})


def test_greedy_need_not_attain_the_optimum_and_the_optimum_is_brute_force_argmax() -> None:
    toy = garden_path()
    outputs = [(*head, END) for head in itertools.product((A, B), (X, Y))]
    best_output = max(outputs, key=toy.logprob)
    assert tuple(exhaustive_search(toy, [0], 3)[0].token_ids) == best_output == (B, X, END)


def test_prunes_are_interchangeable() -> None:
    toy = random_toy(4, seed=11)

    def outputs(prune: object, **options: object) -> list[list[int]]:
        search = Search(prompt_ids=[0], prune=prune, max_tokens=4, end_ids=toy.end_ids, **options)  # type: ignore[arg-type]
        run(toy, [search])
        return [result.token_ids for result in search.results()]

    greedy = greedy_search(toy, [0], 4)
    assert greedy is not None
    assert outputs(top(1)) == [greedy.token_ids]
    every = exhaustive_search(toy, [0], 4, complete_only=False)
    assert outputs(everything) == outputs(top(10_000)) == [result.token_ids for result in every]
    drawn = sample_outputs(toy, [0], 4, 1, seed=9)
    assert outputs(sample(torch.Generator().manual_seed(9))) == [drawn[0].token_ids]


def test_sampling_follows_the_distribution_and_its_seed() -> None:
    toy = garden_path()
    drawn = sample_outputs(toy, [0], 5, 2000, seed=1)
    counts = Counter(tuple(result.token_ids) for result in drawn)
    expected = {(A, X, END): 0.33, (A, Y, END): 0.27, (B, X, END): 0.36, (B, Y, END): 0.04}
    statistic = sum((counts[ids] - 2000 * p) ** 2 / (2000 * p) for ids, p in expected.items())
    assert statistic < 16.27  # chi-square, 3 degrees of freedom, p = 0.001
    assert toy.rows <= 1 + 2 + 4  # equal beginnings are computed once
    assert sample_outputs(toy, [0], 5, 20, seed=1) == sample_outputs(toy, [0], 5, 20, seed=1)
    assert not toy.live


def test_a_pool_of_one_token_makes_sampling_greedy() -> None:
    toy = random_toy(5, seed=2)
    greedy = greedy_search(toy, [0], 6)
    assert greedy is not None

    def only_the_best(scores: torch.Tensor) -> torch.Tensor:
        return scores.where(scores == scores.max(dim=-1, keepdim=True).values, -math.inf)

    assert {tuple(r.token_ids) for r in sample_outputs(toy, [0], 6, 5, seed=0, pool=only_the_best)} == {
        tuple(greedy.token_ids)
    }


def test_equal_scores_are_won_by_the_earlier_path_and_the_lower_token() -> None:
    scores = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -math.inf, -1.0]])
    assert [(choice.row, choice.token) for choice in best(scores, 3)] == [(0, 0), (0, 2), (1, 0)]
    assert len(best(scores, 100)) == 5


def test_everything_is_freed_when_a_forward_fails() -> None:
    toy = random_toy(4, seed=0)
    search = Search(prompt_ids=[0], prune=top(2), max_tokens=4, end_ids=toy.end_ids)

    def broken(*_: object) -> None:
        raise RequestError("memory ran out")

    toy.extend = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RequestError, match="ran out"):
        run(toy, [search])
    assert not toy.live


def test_a_search_without_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        greedy_search(garden_path(), [0], 0)


def test_wider_beams_find_the_optimum_and_cost_in_proportion() -> None:
    errors = search_errors(garden_path(), [0], 5, [1, 2, 3, 4])
    assert [error.logprob for error in errors] == pytest.approx([math.log(0.33)] + [math.log(0.36)] * 3)
    assert [error.found_optimum for error in errors] == [False, True, True, True]
    assert all(error.optimum == pytest.approx(math.log(0.36)) for error in errors)


def test_the_cost_of_a_beam_grows_in_proportion_to_its_width() -> None:
    toy = random_toy(30, seed=4)
    for width in (1, 2, 4, 8):
        params = BeamSearchParams(width=width, max_tokens=6, ignore_eos=True)
        toy.ends_are_final = False
        (found,) = beam_search(toy, [0], params)
        assert found.cost.expanded == 1 + 5 * width
        assert found.cost.forwards == 6

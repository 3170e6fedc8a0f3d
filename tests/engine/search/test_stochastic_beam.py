"""Stochastic beam search draws without replacement: inclusion and order against exact probabilities."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from engine.search.toys import garden_path, random_toy, table
from gristmill.engine.search.exhaustive import exhaustive_search
from gristmill.engine.search.stochastic_beam import _with_maximum, stochastic_beam_search
from gristmill.errors import RequestError

DRAWS = 1000


def test_inclusion_probabilities_are_those_of_sampling_without_replacement() -> None:
    toy = garden_path()
    leaves = {tuple(r.token_ids): math.exp(r.logprob) for r in exhaustive_search(toy, [0], 4)}
    pairs = {
        (first, second): leaves[first] * leaves[second] / (1 - leaves[first])
        for first, second in itertools.permutations(leaves, 2)
    }
    drawn = Counter()  # type: ignore[var-annotated]
    for seed in range(DRAWS):
        first, second = stochastic_beam_search(toy, [0], 2, 4, seed=seed)
        drawn[tuple(first.token_ids), tuple(second.token_ids)] += 1
    for leaf in leaves:
        exact = sum(chance for pair, chance in pairs.items() if leaf in pair)
        share = sum(count for pair, count in drawn.items() if leaf in pair) / DRAWS
        assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / DRAWS))
    statistic = sum((drawn[pair] - DRAWS * p) ** 2 / (DRAWS * p) for pair, p in pairs.items())
    assert statistic < 31.3  # chi-square, 11 degrees of freedom, p = 0.001
    assert not toy.live


def test_a_beam_of_all_leaves_returns_each_once() -> None:
    toy = random_toy(3, seed=1)
    every = exhaustive_search(toy, [0], 3, complete_only=False)
    drawn = stochastic_beam_search(toy, [0], 50, 3, seed=0)
    assert sorted(r.token_ids for r in drawn) == sorted(r.token_ids for r in every)
    for result in drawn:
        assert result.logprob == pytest.approx(toy.logprob(result.token_ids), abs=1e-5)


def test_outputs_differ_and_follow_from_the_seed() -> None:
    toy = random_toy(6, seed=3)
    drawn = stochastic_beam_search(toy, [0], 5, 4, seed=7)
    assert len({tuple(r.token_ids) for r in drawn}) == 5
    assert [r.score for r in drawn] == sorted((r.score for r in drawn), reverse=True)
    assert drawn == stochastic_beam_search(toy, [0], 5, 4, seed=7)
    assert {tuple(r.token_ids) for r in drawn} != {
        tuple(r.token_ids) for r in stochastic_beam_search(toy, [0], 5, 4, seed=8)
    }


def test_finished_outputs_keep_their_places_in_the_beam() -> None:
    toy = table({(): [0.25, 0.75], (0,): [0.5, 0.5]}, 2, 1)  # token 1 ends
    ended_at_once = 0
    for seed in range(40):
        (found,) = stochastic_beam_search(toy, [0], 1, 8, seed=seed)
        ended_at_once += found.token_ids == [1]
        assert found.cost.expanded == len(found.token_ids)  # nothing is expanded beside what was drawn
    assert 20 < ended_at_once < 39
    drawn = [stochastic_beam_search(random_toy(6, seed), [0], 4, 6, seed=seed) for seed in range(20)]
    assert any(r[0].cost.levels[-1] < 4 for r in drawn)


def test_children_have_the_maximum_of_their_parent() -> None:
    values = torch.tensor([[0.3, -2.0, -math.inf, 1.7], [-40.0, -90.0, -41.0, -700.0]], dtype=torch.float64)
    maximum = torch.tensor([[-5.0], [3.0]], dtype=torch.float64)
    moved = _with_maximum(values, maximum)
    assert torch.allclose(moved.max(dim=1).values, maximum[:, 0])
    assert torch.equal(moved.argsort(dim=1), values.argsort(dim=1))
    top = values.max(dim=1, keepdim=True).values
    plain = -torch.log(torch.exp(-maximum) - torch.exp(-top) + torch.exp(-values))
    assert torch.allclose(moved[0], plain[0])


def test_a_beam_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        stochastic_beam_search(garden_path(), [0], 0, 4, seed=0)
    assert caught.value.field == "width"

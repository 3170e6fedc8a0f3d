"""Contrastive decoding: toy numbers, the plausibility set, and all searches over a pair of models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine.search.paging import make, prompt
from engine.search.toys import random_toy, table
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.contrastive_decoding import ContrastivePair, contrast, contrastive_logits
from gristmill.engine.search.single_path import greedy_search, sample_outputs
from gristmill.errors import RequestError

EXPERT, AMATEUR = [0.5, 0.3, 0.16, 0.04], [0.6, 0.1, 0.2, 0.1]


def test_toy_numbers_and_the_plausibility_set() -> None:
    expert, amateur = torch.tensor(EXPERT).log(), torch.tensor(AMATEUR).log()
    scores = contrastive_logits(expert, amateur, 0.1)  # plausible: at least a tenth of .5
    assert scores[:3].tolist() == pytest.approx([math.log(5 / 6), math.log(3), math.log(0.8)], abs=1e-6)
    assert scores[3] == -math.inf
    assert int(scores.argmax()) == 1
    assert torch.isfinite(contrastive_logits(expert, amateur, 0.07)).all()
    assert torch.isfinite(contrastive_logits(expert, amateur, 1.0)).tolist() == [True, False, False, False]


def test_every_search_runs_over_the_pair() -> None:
    expert, amateur = table({(): EXPERT}, 4, 3), table({(): AMATEUR}, 4, 3)
    pair = ContrastivePair(expert, amateur)
    found = greedy_search(pair, [0], 1, objective=contrast(0.1))
    assert found is not None
    assert found.token_ids == [1]
    assert found.score == pytest.approx(math.log(3), abs=1e-6)
    assert found.logprob == pytest.approx(math.log(0.3))
    drawn = sample_outputs(pair, [0], 1, 3000, seed=0, objective=contrast(0.1))
    weights = [5 / 6, 3, 0.8]
    for token, weight in enumerate(weights):
        share = sum(result.token_ids == [token] for result in drawn) / 3000
        assert share == pytest.approx(weight / sum(weights), abs=0.035)
    assert not expert.live
    assert not amateur.live


def test_a_beam_finds_the_output_with_the_best_summed_contrast() -> None:
    expert, amateur = random_toy(4, seed=1, ends=0), random_toy(4, seed=2, ends=0)
    params = BeamSearchParams(width=200, max_tokens=4, length_penalty=0.0)
    (found,) = beam_search(ContrastivePair(expert, amateur), [0], params, objective=contrast(0.2))
    ratios = {}
    for ids in itertools.product(range(4), repeat=4):
        rows = [(expert.chances(ids[:i]), token) for i, token in enumerate(ids)]
        if all(row[token] >= 0.2 * max(row) for row, token in rows):
            ratios[ids] = expert.logprob(ids) - amateur.logprob(ids)
    best = max(ratios, key=ratios.__getitem__)
    assert tuple(found.token_ids) == best
    assert found.score == pytest.approx(ratios[best], abs=1e-5)
    assert found.logprob == pytest.approx(expert.logprob(best), abs=1e-5)


def test_an_amateur_that_knows_nothing_leaves_the_expert() -> None:
    expert, flat = random_toy(5, seed=3), table({}, 5, 4)
    flat.chances = lambda ids: [0.2] * 5
    alone = greedy_search(expert, [0], 6)
    both = greedy_search(ContrastivePair(expert, flat), [0], 6, objective=contrast())
    assert alone is not None
    assert both is not None
    assert (both.token_ids, both.logprob) == (alone.token_ids, pytest.approx(alone.logprob))


def test_two_models_on_block_pools_of_their_own() -> None:
    pair = ContrastivePair(make(), make())
    (found,) = beam_search(pair, prompt(6), BeamSearchParams(width=3, max_tokens=4), objective=contrast())
    assert found.score == pytest.approx(0.0, abs=1e-5)  # the same model twice has no contrast
    for side in (pair.expert, pair.amateur):
        assert side.pool.num_free == side.pool.num_blocks  # type: ignore[attr-defined]


def test_a_failure_of_one_model_frees_both() -> None:
    expert, amateur = random_toy(4, seed=1, ends=0), random_toy(4, seed=2, ends=0)

    def broken(*_: object) -> None:
        raise RequestError("memory ran out")

    amateur.extend = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RequestError, match="ran out"):
        greedy_search(ContrastivePair(expert, amateur), [0], 4, objective=contrast())
    assert not expert.live
    assert not amateur.live
    amateur.start = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RequestError, match="ran out"):
        greedy_search(ContrastivePair(expert, amateur), [0], 4, objective=contrast())
    assert not expert.live


def test_refuses_what_cannot_be_contrasted() -> None:
    with pytest.raises(RequestError, match="vocabularies") as caught:
        ContrastivePair(random_toy(4, seed=0), random_toy(5, seed=0))
    assert caught.value.field == "amateur"
    for plausibility in (0.0, 1.1):
        with pytest.raises(RequestError) as caught:
            contrast(plausibility)
        assert caught.value.field == "plausibility"
    with pytest.raises(TypeError, match="ContrastivePair"):
        greedy_search(random_toy(4, seed=0), [0], 3, objective=contrast())

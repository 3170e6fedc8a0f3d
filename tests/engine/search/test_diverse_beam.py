"""Diverse beam search: groups that are pushed apart. Golden values are of transformers 4.50.3, which still had it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.search.paging import paged, prompt
from engine.search.toys import random_toy
from gristmill.engine.search.beam import BeamSearchParams, beam_search
from gristmill.engine.search.driver import SearchResult

ENDS = range(0, 300, 5)

# num_beams=6, num_beam_groups=3, early_stopping=True, max_new_tokens=6: prompt seed, penalty, end tokens
GOLDEN = [
    (
        0,
        1.5,
        (),
        [
            [162, 235, 18, 36, 245, 248],
            [162, 235, 18, 36, 36, 99],
            [228, 195, 130, 106, 244, 228],
            [228, 195, 130, 106, 156, 123],
            [232, 115, 164, 228, 200, 200],
            [232, 115, 164, 228, 264, 60],
        ],
        [-1.66234, -1.69271, -1.83078, -1.85393, -2.03991, -2.04983],
    ),
    (
        2,
        1.5,
        (),
        [
            [8, 188, 177, 277, 277, 174],
            [8, 188, 177, 277, 277, 277],
            [204, 9, 200, 195, 297, 297],
            [204, 9, 200, 200, 195, 268],
            [84, 145, 255, 188, 112, 152],
            [84, 145, 255, 188, 203, 38],
        ],
        [-1.7034, -1.70672, -1.8736, -1.87444, -2.14663, -2.28201],
    ),
    (
        2,
        4.0,
        (),
        [
            [8, 188, 177, 277, 277, 174],
            [8, 188, 177, 277, 277, 277],
            [204, 9, 200, 195, 297, 297],
            [204, 9, 200, 200, 195, 268],
            [147, 64, 297, 299, 22, 64],
            [147, 64, 297, 299, 22, 219],
        ],
        [-1.7034, -1.70672, -1.8736, -1.87444, -2.35333, -2.39636],
    ),
    (
        1,
        1.5,
        ENDS,
        [[226, 18, 250], [14, 8, 105], [33, 16, 278, 133, 195], [256, 228, 15], [37, 245], [37, 60]],
        [-1.54968, -1.92104, -2.1711, -2.33652, -2.50598, -2.81946],
    ),
]


def search(seed: int, penalty: float, ends: Any = (), **changes: Any) -> list[SearchResult]:
    wanted: dict[str, Any] = {"width": 6, "groups": 3, "n": 6, "max_tokens": 6, "early_stopping": True}
    with paged(end_ids=ends) as model:
        params = BeamSearchParams(**wanted | changes, diversity_penalty=penalty)
        return beam_search(model, prompt(6 + seed, seed), params)


@pytest.mark.parametrize(("seed", "penalty", "ends", "outputs", "scores"), GOLDEN)
def test_equals_transformers(
    seed: int, penalty: float, ends: Any, outputs: list[list[int]], scores: list[float]
) -> None:
    found = search(seed, penalty, ends)
    assert [result.token_ids for result in found] == outputs
    assert [result.score for result in found] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("ends", [(), ENDS])
def test_without_a_penalty_all_groups_are_the_same_beam(ends: Any) -> None:
    found = search(0, 0.0, ends)
    alone = search(0, 0.0, ends, width=2, groups=1, n=2)
    for group in range(3):
        ours = [(result.token_ids, result.score) for result in found if result.group == group]
        assert ours == [(result.token_ids, result.score) for result in alone]


def test_a_large_penalty_gives_each_group_first_tokens_of_its_own() -> None:
    for seed in range(2):
        found = search(seed, 50.0)
        firsts = [{result.token_ids[0] for result in found if result.group == group} for group in range(3)]
        assert all(firsts)
        assert not (firsts[0] & firsts[1])
        assert not (firsts[0] & firsts[2])
        assert not (firsts[1] & firsts[2])


def test_log_probabilities_are_free_of_the_penalty() -> None:
    toy = random_toy(3, seed=2, ends=0)  # too few tokens for all to keep away
    params = BeamSearchParams(width=6, groups=3, n=6, max_tokens=5, diversity_penalty=2.0, length_penalty=0.0)
    found = beam_search(toy, [0], params)
    for result in found:
        assert result.logprob == pytest.approx(toy.logprob(result.token_ids), abs=1e-5)
        assert result.score <= result.logprob + 1e-9
        assert result.group or result.score == pytest.approx(result.logprob)
    assert any(result.score < result.logprob - 1 for result in found)

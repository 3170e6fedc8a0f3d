"""Contrastive search against its formula, a plain loop, and golden values of transformers 4.50.3, which had it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from engine.search.paging import paged, prompt
from engine.search.test_paged import plain
from engine.search.toys import Toy, garden_path
from gristmill.engine.search.contrastive_search import contrastive_scores, contrastive_search
from gristmill.engine.search.single_path import greedy_search
from gristmill.errors import RequestError

# prompt seed, penalty_alpha, top_k, 10 new tokens
GOLDEN = [
    (0, 0.6, 4, [162, 235, 18, 19, 106, 98, 245, 143, 99, 29]),
    (1, 0.6, 4, [256, 26, 77, 107, 141, 188, 228, 296, 165, 14]),
    (2, 0.6, 4, [8, 150, 258, 108, 161, 119, 256, 38, 14, 142]),
    (0, 0.9, 8, [162, 101, 112, 202, 141, 102, 1, 7, 187, 217]),
    (1, 0.9, 8, [132, 219, 22, 266, 60, 76, 296, 127, 113, 275]),
]


def test_the_worked_example() -> None:
    scores = contrastive_scores(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.2, 0.5]), 0.6)
    assert scores.tolist() == pytest.approx([-0.34, 0.0, -0.22], abs=1e-6)
    assert int(scores.argmax()) == 1


@pytest.mark.parametrize(("seed", "alpha", "top_k", "tokens"), GOLDEN)
def test_equals_transformers(seed: int, alpha: float, top_k: int, tokens: list[int]) -> None:
    with paged(keep_hidden=True) as model:
        found = contrastive_search(model, prompt(6 + seed, seed), 10, alpha=alpha, top_k=top_k)
    assert found.token_ids == tokens


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.3, 12), (1.0, 3)])
def test_equals_a_plain_loop(alpha: float, top_k: int) -> None:
    ids = prompt(9, 7)
    sequence, logprob, total = list(ids), 0.0, 0.0
    for _ in range(6):
        logprobs, states = plain(sequence)
        best = []
        for token in logprobs.topk(top_k).indices.tolist():
            new = plain([*sequence, token])[1][-1]
            similarity = max(float(cosine_similarity(new, old, dim=0)) for old in states)
            best.append(((1 - alpha) * float(logprobs[token].exp()) - alpha * similarity, token))
        score, token = max(best)
        sequence, logprob, total = [*sequence, token], logprob + float(logprobs[token]), total + score
    with paged(keep_hidden=True) as model:
        found = contrastive_search(model, ids, 6, alpha=alpha, top_k=top_k)
    assert found.token_ids == sequence[len(ids) :]
    assert found.logprob == pytest.approx(logprob, abs=1e-3)
    assert found.score == pytest.approx(total, abs=1e-3)
    assert found.cost.forwards == 7
    assert found.cost.expanded == 1 + 6 * top_k


def test_without_penalty_it_is_greedy_search() -> None:
    for seed in range(3):
        ids = prompt(8, seed)
        with paged(keep_hidden=True, end_ids=range(0, 300, 9)) as model:
            greedy = greedy_search(model, ids, 8)
            assert greedy is not None
            for options in ({"alpha": 0.0, "top_k": 5}, {"alpha": 0.7, "top_k": 1}):
                found = contrastive_search(model, ids, 8, **options)  # type: ignore[arg-type]
                assert (found.token_ids, found.finish_reason) == (greedy.token_ids, greedy.finish_reason)


def test_what_looks_like_an_earlier_token_is_avoided() -> None:
    def state(seen: tuple[int, ...]) -> list[float]:
        return [1.0, 0.0] if seen[-1] == 0 else [0.0, 1.0] if seen[-1] == 1 else [-1.0, -1.0]

    toy = Toy(lambda ids: [0.6, 0.3, 0.1], 3, [], hidden=state)
    assert contrastive_search(toy, [0], 2, alpha=0.6, top_k=3).token_ids == [2, 1]
    assert contrastive_search(toy, [0], 2, alpha=0.1, top_k=3).token_ids == [0, 0]
    assert not toy.live


@pytest.mark.parametrize(
    ("field", "options"), [("alpha", {"alpha": 1.5}), ("top_k", {"top_k": 0}), ("max_tokens", {"max_tokens": 0})]
)
def test_refuses_what_it_cannot_do(field: str, options: dict[str, float]) -> None:
    with paged(keep_hidden=True) as model, pytest.raises(RequestError) as caught:
        contrastive_search(model, prompt(4), **{"max_tokens": 3, **options})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_model_without_states_is_refused() -> None:
    toy = garden_path()
    with pytest.raises(RequestError, match="hidden states"):
        contrastive_search(toy, [0], 3)
    assert not toy.live

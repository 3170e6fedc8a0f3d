"""The batched filters equal the plain ones, however few candidates they try first; draws follow the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core import SamplingParams
from gristmill.engine.sampling import truncation
from gristmill.engine.sampling.filters import filtered
from gristmill.engine.sampling.truncation import Pool, draw, options_of, pools

VOCAB = 90


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "CANDIDATES", (3, 12))
    monkeypatch.setattr(truncation, "_BLOCK", 4)  # of which the vocabulary is no multiple


def distributions(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """What the pools say, (rows, vocab)."""
    result = torch.full(logits.shape, -1.0, dtype=torch.float64)
    for pool in pools(logits, np.array([options_of(own) for own in params])):
        weights = pool.weights.double() / pool.total()
        assert bool((result[pool.rows] == -1).all())  # each row once
        result[pool.rows] = 0.0
        if pool.ids is None:
            result[pool.rows] = weights
        else:
            assert bool((pool.ids.diff(dim=1) > 0).all())
            result[pool.rows[:, None], pool.ids] = weights
    return result


OPTIONS = {
    "temperature": st.sampled_from([1e-300, 0.3, 1.0, 2.5, 50.0]),
    "temperature_last": st.booleans(),
    "top_n_sigma": st.sampled_from([0.0, 0.0, 0.5, 2.0]),
    "top_k": st.sampled_from([0, -1, 1, 2, 5, 30, 200]),
    "top_p": st.sampled_from([1.0, 1.0, 0.2, 0.6, 0.93]),
    "min_p": st.sampled_from([0.0, 0.0, 0.03, 0.5]),
    "typical_p": st.sampled_from([1.0, 1.0, 0.2, 0.9]),
    "epsilon_cutoff": st.sampled_from([0.0, 0.0, 0.002, 0.05]),
    "eta_cutoff": st.sampled_from([0.0, 0.0, 0.002, 0.05]),
}
some_params = st.fixed_dictionaries({}, optional=OPTIONS).map(lambda chosen: SamplingParams(**chosen))


@given(st.integers(0, 10**6), st.lists(some_params, min_size=1, max_size=5), st.sampled_from([0.3, 3.0]))
@settings(max_examples=120, deadline=None)
def test_pools_equal_the_plain_filters(seed: int, params: list[SamplingParams], spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(len(params), VOCAB, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = float("-inf")
    found = distributions(logits, params)
    for row, own in enumerate(params):
        expected = filtered(logits[row].double(), own).softmax(-1)
        # a threshold may be met to within a rounding: then one token more or less is right as well
        if not torch.allclose(found[row], expected, rtol=1e-4, atol=1e-6):
            assert abs(int((found[row] > 0).sum()) - int((expected > 0).sum())) == 1
        assert torch.equal(distributions(logits[row : row + 1], [own])[0], found[row])  # whatever the batch


@pytest.mark.parametrize("k", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("p", [1.0, 0.05, 0.31, 0.77])
def test_ties_are_settled_alike_at_every_size(k: int, p: float) -> None:
    """Few different values, as in half precision: top-k keeps all that tie, top-p the first of them."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 5, (6, VOCAB), generator=generator).float()
    params = SamplingParams(top_k=k, top_p=p)
    expected = filtered(logits.double(), params).softmax(-1)
    assert torch.allclose(distributions(logits, [params] * 6), expected, atol=1e-6)


def chi_square(expected: Tensor, observed: Tensor) -> float:
    assert bool((observed[expected == 0] == 0).all())
    likely = expected >= 5
    total = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    rest = float(expected[~likely].sum()), float(observed[~likely].sum())
    return float(total) + ((rest[1] - rest[0]) ** 2 / rest[0] if rest[0] > 1e-9 else 0.0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.7, "temperature": 1.5}, {"min_p": 0.05}, {"typical_p": 0.6}],
    ids=str,
)
def test_a_hundred_thousand_draws_follow_the_pool(changes: dict[str, Any]) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    (pool,) = pools(logits, np.array([options_of(SamplingParams(**changes))]))
    count = 100_000
    numbers = np.random.default_rng(0).random(count)
    many = Pool(pool.rows, *(None if part is None else part.expand(count, -1) for part in (pool.ids, pool.weights)))
    observed = draw(many, numbers).bincount(minlength=VOCAB).double()
    expected = filtered(logits[0].double(), SamplingParams(**changes)).softmax(-1) * count
    assert chi_square(expected, observed) < 140  # at most 89 degrees of freedom: passed once in two thousand times


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_no_number_draws_a_dropped_token(number: float) -> None:
    for at in (0, 40, VOCAB - 1):
        weights = torch.zeros(1, VOCAB)
        weights[0, at] = 1e-30
        assert draw(Pool(torch.tensor([0]), None, weights), [number]).tolist() == [at]
        ids = torch.arange(VOCAB)[None] + 7
        assert draw(Pool(torch.tensor([0]), ids, weights.double()), [number]).tolist() == [at + 7]


def test_the_real_sizes_of_candidates_are_exact_for_a_real_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "CANDIDATES", (128, 512, 2048))
    monkeypatch.setattr(truncation, "_BLOCK", 32)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 49_155, generator=generator) * torch.tensor([[8.0], [2.8], [2.0], [0.5]])
    params = [SamplingParams(temperature=0.8, top_p=0.95)] * 4
    found = distributions(logits, params)
    kept = (found > 0).sum(1)
    assert kept[0] < 512 < kept[1] < 2048 < kept[2]  # each of the three sizes was needed
    for row in range(4):
        expected = filtered(logits[row].double(), params[row]).softmax(-1)
        assert abs(int(kept[row]) - int((expected > 0).sum())) <= 2
        assert torch.allclose(found[row], expected, atol=1e-6)

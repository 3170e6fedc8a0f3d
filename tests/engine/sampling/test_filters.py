"""The filters: worked numbers, transformers' warpers, and what holds for any logits and pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core import SamplingParams
from gristmill.engine.sampling import filters

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
INFINITY = float("inf")


def random_logits(seed: int, size: int = 50) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: Tensor) -> list[float]:
    return [round(value, 4) for value in logits.softmax(-1).tolist()]


def test_top_k_worked_examples() -> None:
    assert probabilities(filters.top_k_filter(LOGITS, 2)) == [0.7311, 0.2689, 0, 0]
    assert probabilities(filters.top_k_filter(LOGITS, 3)) == [0.6652, 0.2447, 0.09, 0]
    assert int(filters.top_k_filter(LOGITS, 1).isfinite().sum()) == 1
    for k in (4, 5, 10**6):
        assert torch.equal(filters.top_k_filter(LOGITS, k), LOGITS)


@pytest.mark.parametrize(("p", "kept"), [(1e-12, 1), (0.6, 1), (0.8, 2), (0.95, 3), (0.999999, 4)])
def test_top_p_worked_examples(p: float, kept: int) -> None:
    found = filters.top_p_filter(LOGITS, p)
    assert found.isfinite().tolist() == [place < kept for place in range(4)]
    assert torch.equal(found[:kept], LOGITS[:kept])


def tempered(temperature: float, **changes: Any) -> Tensor:
    return filters.filtered(LOGITS, SamplingParams(temperature=temperature, **changes))


def test_temperature_worked_examples_and_both_orders() -> None:
    assert probabilities(tempered(0.5)) == [0.8650, 0.1171, 0.0158, 0.0021]
    assert probabilities(tempered(2.0)) == [0.4551, 0.2760, 0.1674, 0.1015]
    assert probabilities(tempered(10.0)) == [0.2887, 0.2612, 0.2363, 0.2138]
    assert probabilities(tempered(2.0, top_p=0.8)) == [0.5065, 0.3072, 0.1863, 0]
    assert probabilities(tempered(2.0, top_p=0.8, temperature_last=True)) == [0.6225, 0.3775, 0, 0]
    entropies = [float(torch.distributions.Categorical(logits=tempered(t)).entropy()) for t in (0.5, 1.0, 2.0)]
    assert entropies == pytest.approx([0.4554, 0.9475, 1.2451], abs=1e-4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-8, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    for seed in range(5):
        logits = random_logits(seed)
        for last in (False, True):
            params = SamplingParams(temperature=temperature, top_p=0.9, top_k=5, min_p=0.1, temperature_last=last)
            assert probabilities(filters.filtered(logits, params))[int(logits.argmax())] == 1.0


def test_a_high_temperature_is_uniform_and_a_banned_token_stays_banned() -> None:
    assert probabilities(tempered(1e30)) == [0.25] * 4
    banned = torch.tensor([2.0, -INFINITY, 0.0])
    for temperature in (1e-300, 1.0, 1e300):
        assert probabilities(filters.filtered(banned, SamplingParams(temperature=temperature)))[1] == 0.0


def test_epsilon_and_eta_worked_examples() -> None:
    """Probabilities .6439 .2369 .0871 .0321, entropy .9475: eta = min(.1, sqrt(.1) exp(-.9475)) = .1, and .0388
    of .01 would be above .01."""
    assert filters.epsilon_filter(LOGITS, 0.05).isfinite().tolist() == [True, True, True, False]
    assert filters.epsilon_filter(LOGITS, 0.2).isfinite().tolist() == [True, True, False, False]
    assert filters.epsilon_filter(LOGITS, 0.99).isfinite().tolist() == [True, False, False, False]
    assert filters.eta_filter(LOGITS, 0.1).isfinite().tolist() == [True, True, False, False]
    flat = torch.zeros(100)  # entropy log 100: the cutoff falls to sqrt(.09) / 100, and all tokens stay
    assert bool(filters.eta_filter(flat, 0.09).isfinite().all())
    assert bool(filters.epsilon_filter(flat + torch.arange(100) * 1e-6, 0.09).isfinite().sum() == 1)


def test_top_n_sigma_ignores_the_temperature_and_banned_tokens() -> None:
    logits = torch.tensor([4.0, 2.0, 0.0, -2.0, -INFINITY])  # deviation sqrt(5)
    assert filters.top_n_sigma_filter(logits, 1.0).isfinite().tolist() == [True, True, False, False, False]
    assert filters.top_n_sigma_filter(logits / 7, 1.0).isfinite().tolist() == [True, True, False, False, False]


FILTERS: list[Callable[[Tensor, float], Tensor]] = [
    filters.top_p_filter,
    lambda logits, share: filters.top_k_filter(logits, 1 + int(60 * share)),
    filters.min_p_filter,
    filters.epsilon_filter,
    filters.eta_filter,
    filters.top_n_sigma_filter,
]


@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.sampled_from(FILTERS))
@settings(max_examples=80, deadline=None)
def test_filters_keep_the_best_and_their_ratios(
    seed: int, share: float, keep: Callable[[Tensor, float], Tensor]
) -> None:
    logits = random_logits(seed).double()
    found = keep(logits, share)
    kept = found.isfinite()
    assert kept[logits.argmax()]
    assert torch.equal(found[kept], logits[kept])
    assert float(logits[~kept].max() if bool((~kept).any()) else -INFINITY) <= float(logits[kept].min())
    # two ways to renormalise the pool: divide the probabilities, or take the softmax inside
    chances = logits.softmax(-1)[kept]
    assert torch.allclose(found.softmax(-1)[kept], chances / chances.sum(), rtol=0, atol=1e-12)
    assert bool((found.softmax(-1)[~kept] == 0).all())


@given(st.integers(0, 1000), st.floats(0.05, 0.99))
@settings(max_examples=40, deadline=None)
def test_typical_keeps_the_nearest_to_the_entropy(seed: int, mass: float) -> None:
    logits = random_logits(seed).double()
    chances = logits.softmax(-1)
    distance = (-chances.log() + (chances * chances.log()).sum()).abs()
    kept = filters.typical_filter(logits, mass).isfinite()
    assert float(chances[kept].sum()) >= mass
    assert float(chances[kept].sum() - chances[kept][distance[kept].argmax()]) < mass
    assert float(distance[kept].max()) <= float(distance[~kept].min() if bool((~kept).any()) else INFINITY)


def warped(kind: str, logits: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    transformers = pytest.importorskip("transformers")
    result: Tensor = getattr(transformers, kind)(*arguments, **keywords)(torch.tensor([[0]]), logits[None].clone())[0]
    return result


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_transformers(seed: int) -> None:
    from transformers.generation import logits_process as theirs

    logits = random_logits(seed)
    for k in (1, 3, 49, 50, 80):
        assert torch.equal(filters.top_k_filter(logits, k), warped("TopKLogitsWarper", logits, k))
    for p in (0.05, 0.3, 0.77, 0.99):
        assert torch.equal(filters.top_p_filter(logits, p), warped("TopPLogitsWarper", logits, p))
        assert torch.equal(filters.typical_filter(logits, p), warped("TypicalLogitsWarper", logits, p))
    for p in (0.0, 0.01, 0.2, 1.0):
        assert torch.equal(filters.min_p_filter(logits, p), warped("MinPLogitsWarper", logits, p))
    for p in (1e-4, 0.003, 0.1, 0.9):
        assert torch.equal(filters.epsilon_filter(logits, p), warped("EpsilonLogitsWarper", logits, p))
        expected = theirs.EtaLogitsWarper(p, device="cpu")(torch.tensor([[0]]), logits[None])[0]
        assert torch.equal(filters.eta_filter(logits, p), expected)
    found = filters.filtered(logits, SamplingParams(temperature=0.7))
    assert torch.allclose(found.softmax(-1), warped("TemperatureLogitsWarper", logits, 0.7).softmax(-1), atol=1e-6)


@pytest.mark.peer
def test_ties_with_the_kth_are_kept_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert torch.equal(filters.top_k_filter(logits, 2), warped("TopKLogitsWarper", logits, 2))

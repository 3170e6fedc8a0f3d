"""Each step from logits to a token: worked numbers, transformers' processors, and the distribution of the draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.core import SamplingParams
from gristmill.engine import sampling

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
INFINITY = float("inf")


def random_logits(seed: int, size: int = 50) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def probabilities(logits: Tensor) -> list[float]:
    return [round(value, 4) for value in logits.softmax(-1).tolist()]


def test_top_k_worked_examples() -> None:
    assert probabilities(sampling.top_k_filter(LOGITS, 2)) == [0.7311, 0.2689, 0, 0]
    assert probabilities(sampling.top_k_filter(LOGITS, 3)) == [0.6652, 0.2447, 0.09, 0]
    assert int(sampling.top_k_filter(LOGITS, 1).isfinite().sum()) == 1
    for k in (4, 5, 10**6):
        assert torch.equal(sampling.top_k_filter(LOGITS, k), LOGITS)


@pytest.mark.parametrize(("p", "kept"), [(1e-12, 1), (0.6, 1), (0.8, 2), (0.95, 3), (0.999999, 4)])
def test_top_p_worked_examples(p: float, kept: int) -> None:
    found = sampling.top_p_filter(LOGITS, p)
    assert found.isfinite().tolist() == [place < kept for place in range(4)]
    assert torch.equal(found[:kept], LOGITS[:kept])


def test_temperature_worked_examples_and_its_place_before_the_filters() -> None:
    def tempered(temperature: float, **changes: Any) -> Tensor:
        return sampling.filtered(LOGITS, SamplingParams(temperature=temperature, **changes))

    assert probabilities(tempered(0.5)) == [0.8650, 0.1171, 0.0158, 0.0021]
    assert probabilities(tempered(2.0)) == [0.4551, 0.2760, 0.1674, 0.1015]
    assert probabilities(tempered(2.0, top_p=0.8)) == [0.5065, 0.3072, 0.1863, 0]
    entropies = [float(torch.distributions.Categorical(logits=tempered(t)).entropy()) for t in (0.5, 1.0, 2.0)]
    assert entropies == pytest.approx([0.4554, 0.9475, 1.2451], abs=1e-4)


def test_penalties_worked_examples() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0])
    found = sampling.repetition_penalty(logits, [0, 1, 1], 1.2)
    assert found.tolist() == pytest.approx([1.6667, -1.2, 1.0], abs=1e-4)
    found = sampling.presence_frequency_penalty(logits, [0, 0, 1], 0.3, 0.5)
    assert found.tolist() == pytest.approx([0.7, -1.8, 1.0], abs=1e-6)
    assert logits.tolist() == [2.0, -1.0, 1.0]  # nothing is changed in place


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-8, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    for seed in range(5):
        logits = random_logits(seed)
        found = sampling.filtered(logits, SamplingParams(temperature=temperature, top_p=0.9, top_k=5, min_p=0.1))
        assert probabilities(found)[int(logits.argmax())] == 1.0


def test_a_high_temperature_is_uniform() -> None:
    found = sampling.filtered(LOGITS, SamplingParams(temperature=1e30))
    assert probabilities(found) == [0.25] * 4


@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.integers(1, 60), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_filters_keep_the_best_and_their_ratios(seed: int, p: float, k: int, min_p: float) -> None:
    logits = random_logits(seed)
    for found in (
        sampling.top_p_filter(logits, p),
        sampling.top_k_filter(logits, k),
        sampling.min_p_filter(logits, min_p),
    ):
        kept = found.isfinite()
        assert kept[logits.argmax()]
        assert torch.equal(found[kept], logits[kept])
        assert float(logits[~kept].max() if bool((~kept).any()) else -INFINITY) <= float(logits[kept].min())
        # two ways to renormalise the pool
        pool = logits.double()[kept].exp()
        assert torch.allclose(found.double().softmax(-1)[kept], pool / pool.sum(), atol=1e-12)


def warped(kind: str, logits: Tensor, seen: list[int], *arguments: Any, **keywords: Any) -> Tensor:
    transformers = pytest.importorskip("transformers")
    result: Tensor = getattr(transformers, kind)(*arguments, **keywords)(torch.tensor([seen]), logits[None].clone())[0]
    return result


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(5))
def test_processors_equal_transformers(seed: int) -> None:
    logits, seen = random_logits(seed), [1, 5, 5, 7, 1]
    for k in (1, 3, 49, 50, 80):
        assert torch.equal(sampling.top_k_filter(logits, k), warped("TopKLogitsWarper", logits, seen, k))
    for p in (0.05, 0.3, 0.77, 0.99):
        assert torch.equal(sampling.top_p_filter(logits, p), warped("TopPLogitsWarper", logits, seen, p))
    for p in (0.0, 0.01, 0.2, 1.0):
        assert torch.equal(sampling.min_p_filter(logits, p), warped("MinPLogitsWarper", logits, seen, p))
    for penalty in (0.5, 1.0, 1.3):
        theirs = warped("RepetitionPenaltyLogitsProcessor", logits, seen, penalty)
        assert torch.allclose(sampling.repetition_penalty(logits, seen, penalty), theirs)
    tempered = sampling.filtered(logits, SamplingParams(temperature=0.7))
    assert torch.allclose(
        tempered.softmax(-1), warped("TemperatureLogitsWarper", logits, seen, 0.7).softmax(-1), atol=1e-6
    )
    params = SamplingParams(temperature=1.0, min_tokens=8, max_tokens=9)
    theirs = warped("MinNewTokensLengthLogitsProcessor", logits, seen, 0, 8, [3, 4], device="cpu")
    assert torch.equal(sampling.process_logits(logits, params, [], seen, [3, 4]), theirs)


@pytest.mark.peer
def test_ties_with_the_kth_are_kept_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert torch.equal(sampling.top_k_filter(logits, 2), warped("TopKLogitsWarper", logits, [0], 2))


@given(st.integers(0, 1000), st.lists(st.integers(0, 9), max_size=12), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=50, deadline=None)
def test_penalties_equal_the_formula_of_the_api(
    seed: int, output: list[int], presence: float, frequency: float
) -> None:
    logits = random_logits(seed, 10)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias={2: 5.0, 3: -100.0})
    found = sampling.process_logits(logits, params, [1, 1], output, [])
    bias = {2: 5.0, 3: -100.0}
    for token in range(10):
        count = output.count(token)
        expected = float(logits[token]) - count * frequency - (count > 0) * presence + bias.get(token, 0.0)
        assert float(found[token]) == pytest.approx(expected, abs=1e-4)


def test_neutral_values_do_nothing() -> None:
    params = SamplingParams(temperature=0.0)
    assert not sampling.needs_processing(params, 0)
    assert torch.equal(sampling.process_logits(LOGITS, params, [0, 1], [2, 3], [0]), LOGITS)
    assert torch.equal(sampling.repetition_penalty(LOGITS, [0, 1], 1.0), LOGITS)
    assert torch.equal(sampling.presence_frequency_penalty(LOGITS, [0, 1], 0.0, 0.0), LOGITS)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.1}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1},
     {"logit_bias": {1: 1.0}}, {"min_tokens": 1}],
    ids=str,
)  # fmt: skip
def test_every_change_of_the_logits_is_processed(changes: dict[str, Any]) -> None:
    assert sampling.needs_processing(SamplingParams(**{"temperature": 0.0, **changes}), 0)


def chi_square(logits: Tensor, draws: list[int]) -> float:
    expected = logits.double().softmax(-1) * len(draws)
    observed = torch.tensor(draws).bincount(minlength=len(logits)).double()
    likely = expected >= 5
    assert bool((observed[expected == 0] == 0).all())
    rest = (expected[~likely].sum(), observed[~likely].sum())
    total = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    return float(total + (rest[1] - rest[0]) ** 2 / rest[0].clamp(min=1e-9) * (rest[0] > 1e-9))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7, temperature=1.5),
        SamplingParams(min_p=0.05),
    ],
    ids=["plain", "hot", "top-k", "top-p", "min-p"],
)
def test_draws_follow_the_softmax(params: SamplingParams) -> None:
    logits = sampling.filtered(random_logits(3, 12), params)
    generator = torch.Generator().manual_seed(0)
    draws = [sampling.draw(logits, generator) for _ in range(20_000)]
    # 11 degrees of freedom: 31.3 is passed once in a thousand times
    assert chi_square(logits, draws) < 31.3


def test_draws_repeat_with_the_seed_and_one_token_left_is_always_drawn() -> None:
    def draws(seed: int, logits: Tensor) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sampling.draw(logits, generator) for _ in range(50)]

    assert draws(1, LOGITS) == draws(1, LOGITS) != draws(2, LOGITS)
    banned = torch.full((1000,), -INFINITY)
    banned[617] = -80.0
    assert draws(0, banned) == [617] * 50


def test_top_logprobs_rank_and_order() -> None:
    from engine.helpers import tokenizer

    logprobs = random_logits(0, 20)[None].log_softmax(-1).repeat(2, 1)
    order = logprobs[0].argsort(descending=True).tolist()
    rows = sampling.top_logprobs(logprobs, [order[7], order[1]], 3, tokenizer())
    assert [list(row) for row in rows] == [[order[7], *order[:3]], [order[1], order[0], order[2]]]
    assert [entry.rank for entry in rows[0].values()] == [8, 1, 2, 3]
    assert [entry.rank for entry in rows[1].values()] == [2, 1, 3]
    for row in rows:
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(float(logprobs[0, token]))
            assert entry.decoded_token == tokenizer().decode([token], skip_special_tokens=False)
    assert len(sampling.top_logprobs(logprobs[:1], [0], 100, tokenizer())[0]) == 20
    assert list(sampling.top_logprobs(logprobs[:1], [4], 0, tokenizer())[0]) == [4]
    assert math.isclose(sum(math.exp(value) for value in logprobs[0].tolist()), 1.0, abs_tol=1e-5)

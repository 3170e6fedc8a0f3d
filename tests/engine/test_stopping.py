"""When a completion ends: each check by scripted tokens, probabilities and clocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core import SamplingParams
from gristmill.engine.stopping import Stop, Stopper, generation_flops, repeats
from gristmill.errors import RequestError
from model import tiny


def run(
    tokens: Sequence[int],
    probabilities: Sequence[float | None] | None = None,
    ends: Sequence[int] = (2,),
    max_tokens: int = 100,
    clock: Callable[[], float] = lambda: 0.0,
    flops: Callable[[int], float] | None = None,
    **changes: Any,
) -> tuple[int, Stop | None]:
    """After how many of these tokens a completion ends, and why."""
    stopper = Stopper(SamplingParams(**{"max_tokens": 100, **changes}), ends, max_tokens, clock, flops)
    output: list[int] = []
    for token, probability in zip(tokens, probabilities or [None] * len(tokens), strict=True):
        output.append(token)
        if (stop := stopper.check(output, probability)) is not None:
            return len(output), stop
    return len(output), None


def test_end_tokens() -> None:
    assert run([5, 2, 5]) == (2, ("stop", None))
    assert run([5, 3, 5], ends=[2, 3], stop_token_ids=[3]) == (2, ("stop", 3))
    assert run([5, 2, 5], ends=[], ignore_eos=True) == (3, None)
    assert run([2, 2, 2], min_tokens=2) == (2, ("stop", None))
    assert run([5, 2], max_tokens=2) == (2, ("stop", None))  # it ended by itself, though no more was allowed


def test_length() -> None:
    assert run([5] * 9, max_tokens=4) == (4, ("length", None))
    assert run([2] * 9, max_tokens=4, min_tokens=9) == (4, ("length", None))


def test_a_time_limit_is_met_by_the_first_step_beyond_it() -> None:
    """A clock of a tenth of a second a step, and a limit of 0.35: four tokens."""
    ticks = itertools.count()
    assert run([5] * 9, clock=lambda: 0.1 * next(ticks), max_time=0.35) == (4, ("length", "max_time"))
    assert run([5] * 9, clock=lambda: 0.0, max_time=0.35) == (9, None)


def test_a_compute_budget_is_met_by_the_first_step_beyond_it() -> None:
    assert run([5] * 9, flops=lambda tokens: 10.0 * tokens, max_flops=40.0) == (5, ("length", "max_flops"))
    with pytest.raises(RequestError, match="max_flops"):
        run([5], max_flops=1.0)


def test_operations_are_counted_as_the_accounting_of_the_model_does() -> None:
    config = tiny.model().config
    spent = generation_flops(config, 10)
    assert spent(1) == pytest.approx(sum(config.flops_per_token(seen, training=False) for seen in range(1, 11)))
    assert spent(3) == pytest.approx(sum(config.flops_per_token(seen, training=False) for seen in range(1, 13)))


def test_a_probability_below_the_threshold_ends() -> None:
    assert run([5, 6, 7, 8], [0.9, 0.8, 0.3, 0.9], stop_below_probability=0.5) == (3, ("stop", "probability"))
    assert run([5, 6, 7, 8], [0.9, 0.8, 0.3, 0.0], stop_below_probability=0.0) == (4, None)
    assert run([5, 6, 7], [0.1, 0.1, 0.1], stop_below_probability=0.5, min_tokens=3) == (3, ("stop", "probability"))
    with pytest.raises(ValueError, match="probability"):
        run([5], stop_below_probability=0.5)


def test_repetition() -> None:
    assert run([5, 6, 7, 6, 7, 6, 7], repetition_stop=(2, 3)) == (7, ("stop", "repetition"))
    assert run([5, 6, 7, 6, 7], repetition_stop=(2, 3)) == (5, None)
    assert run([6, 6, 6, 7], repetition_stop=(2, 3)) == (3, ("stop", "repetition"))
    assert run([6, 7, 8] * 3, repetition_stop=(2, 3)) == (9, None)
    assert run([6, 7, 8] * 3, repetition_stop=(3, 3)) == (9, ("stop", "repetition"))
    assert run([6] * 9, repetition_stop=(2, 3), min_tokens=5) == (5, ("stop", "repetition"))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 5), st.integers(2, 4))
def test_repeats_is_what_it_says(ids: list[int], longest: int, count: int) -> None:
    expected = any(ids[-size * count :] == ids[-size:] * count for size in range(1, longest + 1))
    assert repeats(ids, longest, count) == expected


@pytest.mark.peer
def test_criteria_equal_transformers() -> None:
    criteria = pytest.importorskip("transformers").generation.stopping_criteria
    output = [5, 9, 2, 9]
    for length in range(1, 5):
        ids = torch.tensor([output[:length]])
        stopper = Stopper(SamplingParams(max_tokens=3), [2, 3], 3)
        ended = bool(criteria.EosTokenCriteria([2, 3])(ids, None)[0])
        longest = bool(criteria.MaxLengthCriteria(3)(ids, None)[0])
        assert (stopper.check(output[:length]) is not None) == (ended or longest)
        logits = torch.tensor([[0.0, 1.0, 2.0]])
        for threshold in (0.6, 0.7):  # the highest has probability .665
            unsure = bool(criteria.ConfidenceCriteria(threshold)(torch.tensor([[2]]), (logits,)))
            probability = float(logits.softmax(-1)[0, 2])
            found = Stopper(SamplingParams(stop_below_probability=threshold), [], 9).check([2], probability)
            assert (found is not None) == unsure

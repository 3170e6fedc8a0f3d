"""Drafts are as long as pays, and none is made where none pays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.engine.speculation.adaptive import AdaptiveProposer, CostMeter
from gristmill.engine.speculation.estimate import best_length, speed_up
from gristmill.engine.speculation.proposer import Draft, DraftRequest


class Ones:
    """Proposes ones, as many as wanted."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.max_tokens = max_tokens
        self.asked: list[list[int]] = []
        self.forgotten: list[int] = []

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        self.asked.append([request.slot for request in requests])
        return [Draft([1] * min(request.limit, self.max_tokens)) for request in requests]

    def forget(self, slot: int) -> None:
        self.forgotten.append(slot)


def plain(inner: Ones | None = None, **options: Any) -> AdaptiveProposer:
    """Without the steps that only measure."""
    return AdaptiveProposer(inner or Ones(), compare_every=0, **options)


def length(adaptive: AdaptiveProposer, slot: int = 0, limit: int = 99) -> int:
    """Length of the next draft."""
    (draft,) = adaptive.propose([DraftRequest(slot, [1], limit)])
    return len(draft.token_ids)


def test_grows_to_the_longest_while_all_stand() -> None:
    adaptive = plain()
    seen = []
    for _ in range(30):
        seen.append(length(adaptive))
        adaptive.record(0, seen[-1], seen[-1])
    assert seen == sorted(seen)
    assert 1 <= seen[0] < seen[-1] == 8


def test_shrinks_while_they_fall_early_and_then_stops() -> None:
    inner = Ones()
    adaptive = plain(inner, cost_ratio=0.2)
    seen = []
    while not seen or seen[-1]:
        seen.append(length(adaptive))
        adaptive.record(0, seen[-1], 0)
    assert seen == sorted(seen, reverse=True)
    assert 3 < len(seen) < 20
    asked = len(inner.asked)
    assert [length(adaptive) for _ in range(15)] == [0] * 15
    assert len(inner.asked) == asked  # nothing is computed while it is off


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=20), st.floats(0.01, 0.6))
def test_one_more_round_moves_the_length_the_right_way(history: list[int], cost: float) -> None:
    def after(*rounds: int) -> int:
        adaptive = plain(cost_ratio=cost)
        for accepted in (*history, *rounds):
            adaptive.record(0, 8, accepted)
        return length(adaptive)

    assert after(8) >= after() >= after(0)


def off(adaptive: AdaptiveProposer) -> None:
    """Let every draft fall until none is made."""
    while (drafted := length(adaptive)) > 0:
        adaptive.record(0, drafted, 0)


def waits(adaptive: AdaptiveProposer) -> int:
    """Proposals without a draft before the next one, which is made and not answered yet."""
    count = 0
    while length(adaptive) == 0:
        count += 1
    return count


def test_probes_after_a_while_and_waits_twice_as_long_after_each_failure() -> None:
    adaptive = plain(cost_ratio=0.2, probe_after=4)
    off(adaptive)
    found = [1 + waits(adaptive)]  # the first empty one was made by `off`
    for _ in range(6):
        assert length(adaptive) == 2  # a short probe, until one is answered
        adaptive.record(0, 2, 0)
        found.append(waits(adaptive))
    assert found == [4, 8, 16, 32, 64, 64, 64]


def test_a_probe_that_stands_ends_the_wait() -> None:
    adaptive = plain(cost_ratio=0.1, probe_after=4)
    off(adaptive)
    waits(adaptive)
    seen = [2]
    for _ in range(20):
        adaptive.record(0, seen[-1], seen[-1])
        seen.append(length(adaptive))
    assert seen[1] > 0
    assert seen[-1] == 8
    off(adaptive)
    assert 1 + waits(adaptive) == 4  # the wait is short again


def test_requests_learn_apart_and_are_forgotten() -> None:
    inner = Ones()
    adaptive = plain(inner, cost_ratio=0.2)
    off(adaptive)
    adaptive.record(1, 8, 8)
    both = adaptive.propose([DraftRequest(0, [1], 9), DraftRequest(1, [1], 9)])
    assert both[0] == Draft([])
    assert len(both[1].token_ids) > 2
    assert inner.asked[-1] == [1]
    assert adaptive.of(1).tokens_per_round == 9
    assert adaptive.statistics.rounds == adaptive.of(0).rounds + 1
    assert adaptive.statistics.drafted == adaptive.of(0).drafted + 8
    adaptive.forget(0)
    assert inner.forgotten == [0]
    assert length(adaptive) > 0
    assert adaptive.of(0).rounds == 0
    assert adaptive.statistics.accepted == 8


def test_limits_of_requests_hold_and_empty_drafts_count_as_nothing() -> None:
    adaptive = plain()
    assert length(adaptive, limit=1) == 1
    assert length(adaptive, limit=0) == 0
    adaptive.record(0, 0, 0)
    assert adaptive.statistics.rounds == 0


def test_can_be_switched_off_and_then_only_counts() -> None:
    adaptive = AdaptiveProposer(Ones(5), adaptive=False)
    for _ in range(30):
        assert length(adaptive) == 5 == adaptive.max_tokens
        adaptive.record(0, 5, 0)
    assert adaptive.statistics.acceptance_rate == 0


@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("cost", [0.05, 0.15, 0.5])
def test_is_nearly_as_fast_as_the_best_fixed_length(acceptance: float, cost: float) -> None:
    adaptive, rng = plain(cost_ratio=cost), random.Random(0)
    tokens = time = 0.0
    for _ in range(1500):
        drafted, stood = length(adaptive), 0
        while stood < drafted and rng.random() < acceptance:
            stood += 1
        adaptive.record(0, drafted, stood)
        tokens += 1 + stood
        time += 1 + cost * drafted
    best = speed_up(acceptance, best_length(acceptance, cost, 8), cost)
    assert tokens / time > 0.87 * best
    assert tokens / time > 0.97  # where nothing is to be won, next to nothing is lost


def test_the_cost_is_learned_from_step_times() -> None:
    meter = CostMeter(prior=0.5)
    assert meter.ratio(4) == 0.5
    for _ in range(3):
        meter.observe(0.010, 4, 8)
    assert meter.ratio(4) == 0.5  # one length says nothing of what a token costs
    rng = random.Random(0)
    for _ in range(60):
        drafted = rng.randint(0, 6) * 4
        meter.observe(0.020 * (1 + 0.15 * drafted / 4), 4, drafted)
    assert meter.ratio(4) == pytest.approx(0.15, abs=0.01)
    assert meter.ratio(5) == meter.ratio(4)
    assert meter.ratio(9) == 0.5  # batches of another size are measured apart
    for _ in range(100):
        drafted = rng.randint(0, 6)
        meter.observe(0.1 - 0.001 * drafted, 1, drafted)
    assert meter.ratio(1) == 0.0  # noise does not make drafts cheaper than nothing


def test_some_steps_are_made_without_drafts_to_compare_with() -> None:
    adaptive = AdaptiveProposer(Ones(), cost_ratio=0.01, compare_every=8)
    found = []
    for _ in range(24):
        found.append(length(adaptive))
        adaptive.record(0, found[-1], found[-1])
        adaptive.cost.observe(1 + 0.25 * found[-1], 1, found[-1])
    assert [step for step, drafted in enumerate(found, start=1) if drafted == 0] == [2, 4, 8, 16, 24]
    assert adaptive.cost.ratio(1) == pytest.approx(0.25)  # though drafts that always stand have always one length


def test_dear_drafts_are_shorter() -> None:
    lengths = []
    for cost in (0.02, 0.2, 0.9):
        adaptive = plain(cost_ratio=0.1)
        for drafted in (0, 4) * 20:
            adaptive.cost.observe(1 + cost * drafted, 1, drafted)
        adaptive.record(0, 8, 5)
        lengths.append(length(adaptive))
    assert lengths[0] > lengths[1] > lengths[2] == 0

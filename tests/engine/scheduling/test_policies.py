"""Who goes first, and what the order is good for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.scheduling.policies import (
    EarliestDeadline,
    FairShare,
    FirstCome,
    Policy,
    PriorityFirst,
    ShortestFirst,
    policy_named,
)
from gristmill.engine.scheduling.simulate import Job, Simulator, Trace, one_per_token
from gristmill.errors import RequestError


@dataclass
class Waiting:
    arrival: int = 0
    priority: int = 0
    arrived_at: float = 0.0
    deadline: float | None = None
    user: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_missing_tokens: int = 1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)


def order(policy: Policy, waiting: list[Waiting], now: float = 0.0) -> list[int]:
    return [w.arrival for w in sorted(waiting, key=lambda w: policy.key(w, now))]


def admitted(trace: Trace) -> list[str]:
    return list(dict.fromkeys(part.name for step in trace.iterations for part in step.parts))


def test_the_lower_priority_value_goes_first_and_ties_by_arrival() -> None:
    values = [2, 0, 1, 0, 2]
    waiting = [Waiting(arrival=place, priority=value) for place, value in enumerate(values)]
    assert order(PriorityFirst(), waiting[::-1]) == [1, 3, 2, 0, 4]
    assert order(FirstCome(), waiting[::-1]) == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(-3, 3), max_size=20), st.randoms())
def test_priorities_order_as_a_heap_of_priority_and_arrival_does(values: list[int], random: object) -> None:
    waiting = [Waiting(arrival=place, priority=value) for place, value in enumerate(values)]
    expected = [place for _, place in sorted((value, place) for place, value in enumerate(values))]
    random.shuffle(waiting)  # type: ignore[attr-defined]
    assert order(PriorityFirst(), waiting) == expected


def test_the_shortest_by_prompt_or_by_expected_work() -> None:
    waiting = [Waiting(arrival=0, token_ids=[0] * 9), Waiting(arrival=1, token_ids=[0] * 2), Waiting(arrival=2)]
    assert order(ShortestFirst(), waiting) == [2, 1, 0]
    assert order(ShortestFirst(work=lambda w: 10 - len(w.token_ids)), waiting) == [0, 1, 2]


def test_shortest_first_has_the_least_mean_latency_on_one_server() -> None:
    jobs = [Job(name=str(size), prompt=size) for size in (5, 1, 3)]
    mean = {
        type(policy): Simulator(capacity=1, policy=policy, cost=one_per_token).run(jobs).summary().latency.mean
        for policy in (FirstCome(), ShortestFirst())
    }
    assert mean == {FirstCome: pytest.approx((5 + 6 + 9) / 3), ShortestFirst: pytest.approx((1 + 4 + 9) / 3)}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12), st.randoms())
def test_deadlines_that_some_order_meets_are_met(work: list[tuple[int, int]], random: object) -> None:
    """One server: each deadline is what a random order of the same jobs needs, and some slack."""
    random.shuffle(work)  # type: ignore[attr-defined]
    done, jobs = 0, []
    for place, (size, slack) in enumerate(work):
        done += size
        jobs.append(Job(name=str(place), prompt=size, deadline=done + slack))
    random.shuffle(jobs)  # type: ignore[attr-defined]
    trace = Simulator(capacity=1, policy=EarliestDeadline(), cost=one_per_token).run(jobs)
    assert all(trace.finished[job.name] <= (job.deadline or 0) for job in jobs)


def test_first_come_misses_a_deadline_that_earliest_deadline_meets() -> None:
    jobs = [Job(name="long", prompt=9), Job(name="urgent", prompt=2, deadline=3), Job(name="soon", deadline=4)]
    traces = {
        type(p): Simulator(capacity=1, policy=p, cost=one_per_token).run(jobs)
        for p in (FirstCome(), EarliestDeadline())
    }
    assert traces[FirstCome].finished["urgent"] == 11
    assert traces[EarliestDeadline].finished == {"urgent": 2, "soon": 3, "long": 12}


def test_ageing_prevents_starvation() -> None:
    """An urgent job comes at every moment; without ageing the patient one waits for the last of them."""
    jobs = [Job(name="patient", priority=5), *(Job(name=str(i), arrives=i, priority=0) for i in range(60))]
    finished = {
        ageing: Simulator(capacity=1, policy=PriorityFirst(ageing=ageing)).run(jobs).finished["patient"]
        for ageing in (0.0, 0.5)
    }
    assert finished[0.0] == 61
    assert finished[0.5] <= 5 / 0.5 + 2


def test_the_user_with_the_fewest_tokens_goes_first() -> None:
    greedy = [Job(name=f"a{i}", prompt=4, user="a") for i in range(6)]
    modest = [Job(name=f"b{i}", prompt=4, user="b", arrives=0.5) for i in range(2)]
    fair = admitted(Simulator(capacity=1, policy=FairShare(), cost=one_per_token).run([*greedy, *modest]))
    assert fair[:5] == ["a0", "b0", "a1", "b1", "a2"]
    assert admitted(Simulator(capacity=1, cost=one_per_token).run([*greedy, *modest]))[-1] == "b1"


def test_a_policy_by_name() -> None:
    assert policy_named("priority", ageing=2.0, prefill_first=True) == PriorityFirst(False, 2.0)
    with pytest.raises(RequestError, match="Did you mean fair") as wrong:
        policy_named("fare")
    assert wrong.value.field == "policy"
    with pytest.raises(RequestError, match="ageing"):
        policy_named("fair", ageing=1.0)

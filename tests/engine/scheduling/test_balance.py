"""Balancing requests of very different cost over workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.scheduling.balance import Balancer, LeastOutstanding, Load, PrefixAware, RoundRobin, simulate
from gristmill.errors import RequestError


def test_least_outstanding_halves_what_round_robin_takes_on_a_skewed_trace() -> None:
    pairs = 40
    loads = [Load(cost) for _ in range(pairs) for cost in (10.0, 1.0)]
    assert simulate(loads, RoundRobin()).makespan == 10 * pairs
    assert simulate(loads, LeastOutstanding()).makespan == pytest.approx(5.5 * pairs, abs=5.5)


def test_a_worker_twice_as_fast_gets_twice_as_much() -> None:
    found = simulate([Load(1.0)] * 300, LeastOutstanding(), speeds=(1.0, 2.0))
    assert found.computed == pytest.approx([100, 200], abs=2)
    assert simulate([Load(1.0)] * 300, RoundRobin(), speeds=(1.0, 2.0)).makespan == 150
    assert found.makespan == pytest.approx(100, abs=1)


def test_a_shared_prefix_is_computed_once_on_each_worker_that_serves_it() -> None:
    shared = [tuple([topic] * 90) for topic in range(2)]
    loads = [Load(100.0, 60.0 * i, (*shared[(i // 2) % 2], i)) for i in range(12)]
    aware, blind = simulate(loads, PrefixAware()), simulate(loads, LeastOutstanding())
    assert sum(aware.computed) == 2 * 100 + 10 * 10
    assert sum(aware.computed) < sum(blind.computed)
    assert len({worker for worker, load in zip(aware.worker_of, loads, strict=True) if load.prompt[0] == 0}) == 1


def test_a_cached_prefix_does_not_draw_requests_behind_a_long_queue() -> None:
    prompt = tuple(range(50))
    loads = [Load(50.0, 0.0, prompt), *[Load(500.0, 1000.0)], Load(60.0, 1000.0, prompt)]
    assert simulate(loads, PrefixAware()).worker_of == [0, 0, 1]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=30),
    st.sampled_from([RoundRobin, LeastOutstanding, PrefixAware]),
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=4),
)
def test_every_request_is_computed_once(work: list[tuple[int, int]], kind: type, speeds: list[float]) -> None:
    moment, loads = 0, []
    for cost, gap in work:
        moment += gap
        loads.append(Load(cost, moment))
    balancer: Balancer = kind()
    found = simulate(loads, balancer, speeds=speeds)
    assert len(found.worker_of) == len(loads)
    assert sum(found.computed) == pytest.approx(sum(load.cost for load in loads))
    for number, computed in enumerate(found.computed):
        assert computed == pytest.approx(
            sum(x.cost for x, w in zip(loads, found.worker_of, strict=True) if w == number)
        )
    assert found.makespan >= sum(found.computed) / sum(speeds) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("loads", "speeds"), [([Load(0.0)], [1.0]), ([Load(1.0, 5.0), Load(1.0, 2.0)], [1.0]), ([], []), ([], [0.0])]
)
def test_what_makes_no_sense_is_refused(loads: list[Load], speeds: list[float]) -> None:
    with pytest.raises(RequestError):
        simulate(loads, RoundRobin(), speeds=speeds)

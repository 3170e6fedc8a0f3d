"""Pipeline schedules: their order, their time, and what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gristmill.errors import RequestError
from gristmill.train.pipeline_reference import run_schedule
from gristmill.train.schedule_simulator import (
    Job,
    Schedule,
    Timeline,
    gpipe,
    one_after_another,
    one_forward_one_backward,
    simulate,
)

Make = Callable[[int, int], Schedule]
both = st.sampled_from([gpipe, one_forward_one_backward])
small = st.integers(1, 7)
durations = st.sampled_from([0.5, 1.0, 2.0, 3.0])


def holds(timeline: Timeline) -> None:
    """No worker does two things at a time, and nothing begins before what it needs is done."""
    ends = {item.job: item.end for item in timeline.placed}
    for item in timeline.placed:
        assert all(ends[need] <= item.start for need in item.job.needs(timeline.stages))
    for stage in range(timeline.stages):
        own = [item for item in timeline.placed if item.job.stage == stage]
        assert all(before.end <= after.start for before, after in itertools.pairwise(own))


@settings(max_examples=60, deadline=None)
@given(both, small, small, durations, durations, st.data())
def test_workers_do_one_thing_at_a_time_and_wait_for_what_they_need(
    make: Make, stages: int, micros: int, forward: float, backward: float, data: st.DataObject
) -> None:
    slowness = data.draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=stages, max_size=stages))
    timeline = simulate(make(stages, micros), forward=forward, backward=backward, slowness=slowness)
    holds(timeline)
    assert len(set(timeline.trace)) == 2 * stages * micros
    assert timeline.slots >= micros * (forward + backward) * max(slowness)


@settings(max_examples=60, deadline=None)
@given(both, small, small)
def test_the_bubble_is_that_of_the_paper(make: Make, stages: int, micros: int) -> None:
    timeline = simulate(make(stages, micros))
    assert timeline.slots == 2 * (micros + stages - 1)
    assert timeline.bubble == pytest.approx((stages - 1) / (micros + stages - 1))


def test_worked_numbers() -> None:
    assert Fraction(simulate(gpipe(3, 3)).bubble).limit_denominator(100) == Fraction(2, 5)
    assert Fraction(simulate(gpipe(4, 8)).bubble).limit_denominator(100) == Fraction(3, 11)
    assert simulate(gpipe(3, 3)).slots == 10
    assert 3 * simulate(one_after_another(3)).slots == 18
    assert str(simulate(gpipe(3, 3))) == "123....cba\n.123..cba.\n..123cba.."
    assert str(simulate(one_forward_one_backward(3, 3))) == "123..a.b.c\n.12.a3b.c.\n..1a2b3c.."


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_without_micro_batches_one_worker_works_at_a_time(layers: int) -> None:
    timeline = simulate(one_after_another(layers))
    up = [f"B{layer},1↑" for layer in range(1, layers + 1)]
    assert list(map(str, timeline.trace)) == up + [job.replace("↑", "↓") for job in reversed(up)]
    assert timeline.utilisation == pytest.approx(1 / layers)


@settings(max_examples=40, deadline=None)
@given(small, small)
def test_one_forward_one_backward_holds_fewer_activations(stages: int, micros: int) -> None:
    wide, narrow = simulate(gpipe(stages, micros)), simulate(one_forward_one_backward(stages, micros))
    assert [wide.most_kept(stage) for stage in range(stages)] == [micros] * stages
    assert [narrow.most_kept(stage) for stage in range(stages)] == [min(stages - s, micros) for s in range(stages)]


def test_a_slow_worker_slows_all() -> None:
    even, slow = (simulate(gpipe(4, 32), slowness=[1, factor, 1, 1]) for factor in (1, 2))
    assert 1.8 < slow.slots / even.slots <= 2


@pytest.mark.parametrize("make", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize("micros", [1, 3, 4])
def test_outputs_and_gradients_are_those_of_one_device(make: Make, micros: int) -> None:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)] + [nn.Linear(6, 5)]
    inputs, targets = torch.randn(12, 6), torch.randint(5, (12,))
    whole = F.cross_entropy(nn.Sequential(*stages)(inputs), targets)
    expected = torch.autograd.grad(whole, list(nn.ModuleList(stages).parameters()))
    parts = targets.chunk(micros)

    def loss_sum(output: torch.Tensor, micro: int) -> torch.Tensor:
        return F.cross_entropy(output, parts[micro], reduction="sum") / len(targets)

    schedule = make(3, micros)
    total, trace = run_schedule(stages, schedule, inputs.chunk(micros), loss_sum)
    torch.testing.assert_close(total, whole.detach())
    for parameter, gradient in zip(nn.ModuleList(stages).parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert [tuple(job for job in trace if job.stage == stage) for stage in range(3)] == list(schedule)


def test_a_stage_sees_only_what_its_neighbours_hand_over() -> None:
    """Every boundary is cut: the loss has no path of gradients into an earlier stage but the one handed back."""
    stages = [nn.Linear(2, 2) for _ in range(2)]
    seen: list[bool] = []
    stages[1].register_forward_pre_hook(lambda _module, given: seen.append(given[0].is_leaf))
    run_schedule(stages, gpipe(2, 2), [torch.ones(1, 2)] * 2, lambda output, _micro: output.sum())
    assert seen == [True, True]


def test_schedules_that_cannot_be_are_refused() -> None:
    up, down = Job(0, 0, False), Job(0, 0, True)
    with pytest.raises(RequestError, match="never ends"):
        simulate(((down, up),))
    for broken in ((), ((up,),), ((up, up, down),), ((up, down), (up, down))):
        with pytest.raises(RequestError, match=r"schedule needs|must do"):
            simulate(broken)
    with pytest.raises(RequestError, match="above 0"):
        simulate(gpipe(2, 2), slowness=[1, 0])
    with pytest.raises(RequestError, match="micro_batches"):
        gpipe(2, 0)
    with pytest.raises(RequestError, match="for 2 stages and 3 micro-batches"):
        run_schedule([nn.Linear(1, 1)], gpipe(2, 3), [torch.ones(1, 1)] * 3, lambda output, _micro: output.sum())
    with pytest.raises(RequestError, match="one-slot"):
        str(simulate(gpipe(2, 2), backward=2))

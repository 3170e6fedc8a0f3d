"""What more devices bring: efficiency, stragglers, and gradients that travel early or late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import DataError, RequestError
from gristmill.objectives.causal import CausalLM
from gristmill.train.efficiency import report_markdown, synchronous_step, throughput_report
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.data import replicate, sum_gradients
from gristmill.train.parallel.mesh import stop
from gristmill.train.world import LossModule
from train.parallel.spawn import read, together, write
from train.toy import toy_loader, toy_model

times = st.floats(0.1, 10)


def test_efficiency_is_the_time_of_one_over_all_devices_time() -> None:
    lines = throughput_report({4: 30.0, 1: 100.0, 2: 50.0}, samples=1000)
    assert [line.devices for line in lines] == [1, 2, 4]
    assert [line.efficiency for line in lines] == [1.0, 1.0, 100 / (4 * 30)]
    assert [line.speed_up for line in lines] == pytest.approx([1.0, 2.0, 10 / 3])
    assert [line.samples_per_second for line in lines] == pytest.approx([10, 20, 1000 / 30])
    assert report_markdown(lines).splitlines()[-1] == "| 4 | 30 | 33.33 | 3.33 | 83% |"


def test_a_report_without_its_reference_is_refused() -> None:
    with pytest.raises(DataError, match="1 device"):
        throughput_report({2: 1.0}, samples=1)
    with pytest.raises(DataError, match="above 0"):
        throughput_report({1: 0.0}, samples=1)


def test_one_worker_twice_as_slow_makes_the_step_twice_as_long() -> None:
    assert synchronous_step([3.0] * 7 + [6.0]) == 2 * synchronous_step([3.0] * 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(times, min_size=1, max_size=6), times, st.integers(1, 20))
def test_overlap_hides_communication_but_its_last_part(
    compute: list[float], communication: float, buckets: int
) -> None:
    plain = synchronous_step(compute, communication, buckets=buckets)
    overlapped = synchronous_step(compute, communication, buckets=buckets, overlap=True)
    assert plain == max(compute) + communication
    assert overlapped <= plain * (1 + 1e-12)
    least = max(max(compute) + communication / buckets, communication + max(compute) / buckets)
    assert overlapped == pytest.approx(least)


@pytest.mark.parametrize("arguments", [([],), ([-1.0],), ([1.0], -1.0)])
def test_impossible_steps_are_refused(arguments: tuple) -> None:
    with pytest.raises(RequestError, match="give the time"):
        synchronous_step(*arguments)


def gradients(directory: Path) -> None:
    """One backward pass, its gradients summed while it runs and after it."""
    mesh = start(Parallel(data=2), "cpu")
    batch = toy_loader().batch(mesh.rank("shares"))
    for name in ("early", "late"):
        model = toy_model()
        module: torch.nn.Module = LossModule(model, CausalLM())
        if name == "early":
            module = replicate(module, mesh)
        module(batch)["loss"].backward()
        if name == "late":
            sum_gradients(list(model.parameters()), mesh.group("replicas"))
        if mesh.is_main:
            write(directory / name, {key: p.grad for key, p in model.named_parameters()})
    stop()


def test_gradients_that_travel_early_are_the_same_bits(tmp_path: Path) -> None:
    together(gradients, 2, tmp_path)
    early, late = read(tmp_path / "early"), read(tmp_path / "late")
    assert early.keys() == late.keys()
    assert all(torch.equal(early[name], late[name]) and bool(late[name].any()) for name in late)
    alone = toy_model()
    for number in range(2):
        CausalLM().loss_sum(alone, toy_loader().batch(number))[0].backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(early[name], parameter.grad)

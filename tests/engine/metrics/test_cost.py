"""Joules and dollars."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.metrics.cost import Nvml, Rapl, SampledPower, dollars_per_million_tokens, energy, find_meter
from gristmill.errors import RequestError


def test_constant_power_for_two_seconds() -> None:
    trace = [(0.5 * step, 100.0) for step in range(5)]
    assert energy(trace) == pytest.approx(200.0)
    assert energy(trace) / 50 == pytest.approx(4.0)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 500)), min_size=2, max_size=20))
def test_energy_is_the_integral_of_the_lines_between_samples(samples: list[tuple[float, float]]) -> None:
    samples.sort(key=lambda sample: sample[0])
    times, watts = zip(*samples, strict=True)
    assert energy(samples) == pytest.approx(float(np.trapezoid(watts, times)), abs=1e-9)


def test_sampled_power_is_integrated_between_readings() -> None:
    moments, watts = iter([0.0, 1.0, 3.0]), iter([100.0, 100.0, 200.0])
    meter = SampledPower(lambda: next(watts), source="trace", clock=lambda: next(moments))
    assert meter.joules() == pytest.approx(100.0)
    assert meter.joules() == pytest.approx(400.0)


def test_price_of_a_million_tokens() -> None:
    assert dollars_per_million_tokens(2.0, 1000.0) == pytest.approx(0.5556, abs=5e-5)


@pytest.mark.parametrize(("price", "rate"), [(-1.0, 5.0), (1.0, 0.0)])
def test_prices_that_cannot_be_are_refused(price: float, rate: float) -> None:
    with pytest.raises(RequestError):
        dollars_per_million_tokens(price, rate)


@pytest.mark.parametrize("trace", [[], [(0.0, 1.0)], [(1.0, 1.0), (0.0, 1.0)]])
def test_traces_that_cannot_be_are_refused(trace: list[tuple[float, float]]) -> None:
    with pytest.raises(RequestError):
        energy(trace)


def package(root: Path, name: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("9999999\n")
    return folder


def test_the_processors_counters_are_added_and_may_wrap(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 9_000_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the first: must not count twice
    package(tmp_path, "intel-rapl:1", 0)
    meter, source = find_meter(root=tmp_path)
    assert isinstance(meter, Rapl)
    assert "RAPL" in source
    package(tmp_path, "intel-rapl:0", 1_000_000)  # past its range of ten joules
    package(tmp_path, "intel-rapl:0:0", 5_000_000)
    package(tmp_path, "intel-rapl:1", 500_000)
    assert meter.joules() == pytest.approx(2.0 + 0.5)
    package(tmp_path, "intel-rapl:1", 700_000)
    assert meter.joules() == pytest.approx(2.7)


def test_where_nothing_can_be_read_it_is_said_why(tmp_path: Path) -> None:
    meter, why = find_meter(root=tmp_path)
    assert meter is None
    assert "no energy counter" in why
    (package(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text("not for you")
    meter, why = find_meter(root=tmp_path)
    assert meter is None
    assert "cannot be read" in why


def test_the_devices_counter_is_in_millijoules() -> None:
    readings = iter([5_000, 7_500])
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda index: ("device", index),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {("device", 1): next(readings)}[handle],
    )
    assert Nvml(nvml, 1).joules() == pytest.approx(2.5)

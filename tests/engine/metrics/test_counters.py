"""The engine's counters."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.metrics.counters import EDGES, EngineMetrics, Histogram


@given(st.lists(st.floats(0, 200), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_histogram_counts_everything_and_bounds_its_percentiles(seconds: list[float], share: float) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.add(value)
    assert sum(histogram.counts) == histogram.number == len(seconds)
    assert histogram.total == pytest.approx(sum(seconds))
    bound = histogram.below(share)
    assert bound is not None
    assert sum(value <= bound for value in seconds) >= share * len(seconds)
    smaller = [edge for edge in EDGES if edge < bound]
    if smaller:
        assert sum(value <= smaller[-1] for value in seconds) < share * len(seconds)


def test_rates() -> None:
    metrics = EngineMetrics(prompt_tokens=40, cached_prompt_tokens=30, drafted_tokens=8, accepted_tokens=6)
    assert (metrics.cache_hit_rate, metrics.acceptance) == (0.75, 0.75)
    metrics.schedule_seconds.add(0.01)
    metrics.sample_seconds.add(0.03)
    metrics.forward_seconds.add(0.96)
    assert metrics.overhead == pytest.approx(0.04)
    with metrics.timed(metrics.forward_seconds):
        pass
    assert metrics.forward_seconds.number == 2


def test_a_fresh_engine_has_no_rates_and_everything_is_json() -> None:
    metrics = EngineMetrics()
    assert (metrics.cache_hit_rate, metrics.acceptance, metrics.overhead) == (None, None, None)
    assert Histogram().below(0.5) is None
    metrics.forward_seconds.add(1e9)
    assert metrics.forward_seconds.below(0.5) == float("inf")
    facts = json.loads(json.dumps(metrics.snapshot(), allow_nan=False))
    assert facts["forward_seconds"] == {"number": 1, "sum": 1e9, "mean": 1e9, "buckets": {"+Inf": 1}}
    assert {"steps", "preempted", "blocks_free", "cache_hit_rate"} <= facts.keys()

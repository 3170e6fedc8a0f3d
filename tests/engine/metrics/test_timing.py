"""Latency and throughput from token times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine.metrics.timing import Percentiles, RequestTiming, percentiles, summarise
from gristmill.errors import RequestError

FIVE = RequestTiming(10.0, [10.50, 10.55, 10.62, 10.70, 10.80], prompt_tokens=7)


def test_one_request() -> None:
    assert FIVE.time_to_first_token == pytest.approx(0.50)
    assert FIVE.inter_token_latencies == pytest.approx([0.05, 0.07, 0.08, 0.10])
    assert FIVE.time_per_output_token == pytest.approx(0.075) == np.mean(FIVE.inter_token_latencies)
    assert FIVE.latency == pytest.approx(0.80)
    assert FIVE.tokens_per_second == pytest.approx(6.25)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_latency_is_the_first_token_and_all_gaps(gaps: list[float]) -> None:
    timing = RequestTiming(3.0, [float(t) for t in 3.0 + np.cumsum(gaps)], 1)
    assert timing.latency == pytest.approx(timing.time_to_first_token + sum(timing.inter_token_latencies))
    assert len(timing.inter_token_latencies) == len(gaps) - 1


def test_a_single_token_has_no_time_per_token_and_is_left_out_of_it() -> None:
    single = RequestTiming(0.0, [0.3], 1)
    assert single.time_per_output_token is None
    found = summarise([single, RequestTiming(0.0, [0.2, 0.4], 1)])
    assert found.time_per_output_token is not None
    assert found.time_per_output_token.mean == pytest.approx(0.2)
    alone = summarise([single])
    assert (alone.time_per_output_token, alone.inter_token_latency) == (None, None)
    assert alone.latency.p99 == pytest.approx(0.3)


def test_throughput_of_two_requests() -> None:
    a = RequestTiming(0.0, [float(t) for t in np.linspace(0.1, 1.5, 10)], 5)
    b = RequestTiming(0.0, [float(t) for t in np.linspace(0.2, 2.0, 20)], 3)
    found = summarise([a, b])
    assert found.duration == pytest.approx(2.0)
    assert found.output_throughput == pytest.approx(15.0)
    assert found.request_throughput == pytest.approx(1.0)
    assert found.total_throughput == pytest.approx((30 + 8) / 2)
    assert found.tokens_per_second is not None
    assert found.tokens_per_second.mean == pytest.approx((10 / 1.5 + 20 / 2) / 2), "users see their own requests"
    assert summarise([a, b], duration=4.0).output_throughput == pytest.approx(7.5)


def test_percentiles_are_those_of_numpy() -> None:
    values = [float(x) for x in range(101)]
    assert percentiles(values) == Percentiles(50.0, 50.0, 95.0, 99.0)
    assert percentiles([]) is None


@pytest.mark.parametrize("times", [[], [0.5], [2.0, 1.5]])
def test_times_that_cannot_be_are_refused(times: list[float]) -> None:
    with pytest.raises(RequestError):
        RequestTiming(1.0, times, 1)


def test_no_requests_and_no_time_are_refused() -> None:
    for timings in ([], [RequestTiming(1.0, [1.0], 1)]):
        with pytest.raises(RequestError):
            summarise(timings)

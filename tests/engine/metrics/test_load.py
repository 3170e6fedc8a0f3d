"""Load generation, on an engine whose clock is ours."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gristmill.core import CompletionOutput, RequestOutput, SamplingParams
from gristmill.engine.metrics.load import LoadRequest, burst_arrivals, drive, poisson_arrivals
from gristmill.errors import RequestError


class Clocked:
    """Each step takes a second and gives every request in it a token; at most `seats` at once, in order."""

    def __init__(self, seats: int = 100, *, fails: int | None = None, per_step: int = 1) -> None:
        self.now, self.seats, self.fails, self.per_step = 5.0, seats, fails, per_step
        self.open: dict[str, tuple[int, list[int]]] = {}
        self.most = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def add(self, prompt: list[int], params: SamplingParams, *, request_id: str | None = None) -> str:
        assert request_id is not None
        self.open[request_id] = (params.max_tokens or 0, [])
        self.most = max(self.most, len(self.open))
        return request_id

    def has_unfinished(self) -> bool:
        return bool(self.open)

    def step(self) -> list[RequestOutput]:
        self.now += 1.0
        outputs = []
        for name in list(self.open)[: self.seats]:
            wanted, ids = self.open[name]
            failed = name == str(self.fails)
            if not failed:
                ids += [1] * min(self.per_step, wanted - len(ids))
            done = failed or len(ids) == wanted
            completion = CompletionOutput(0, "", list(ids), finish_reason="error" if failed else None, error="broken")
            outputs.append(RequestOutput(name, None, [1], [completion], done))
            if done:
                del self.open[name]
        return outputs


def requests(count: int, tokens: int = 3) -> list[LoadRequest]:
    return [LoadRequest([1] * 4, SamplingParams(max_tokens=tokens)) for _ in range(count)]


def test_poisson_arrivals_have_exponential_gaps_and_repeat() -> None:
    moments = poisson_arrivals(4.0, 20_000, seed=3)
    gaps = np.diff(moments)
    assert moments[0] == 0.0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03), "as an exponential distribution has it"
    assert np.mean(gaps > 0.25) == pytest.approx(math.exp(-1), abs=0.01)
    assert moments == poisson_arrivals(4.0, 20_000, seed=3) != poisson_arrivals(4.0, 20_000, seed=4)


def test_bursts_keep_the_rate() -> None:
    moments = burst_arrivals(4.0, 8_001, burst=8, seed=1)
    assert len(moments) == 8_001
    sizes = np.unique(moments, return_counts=True)[1]
    assert set(sizes[:-1].tolist()) == {8}
    assert 8_000 / moments[-1] == pytest.approx(4.0, rel=0.08)


def test_open_loop_waiting_counts_from_the_arrival() -> None:
    engine = Clocked(seats=1)
    found = drive(engine, requests(2), arrivals=[0.0, 0.5], clock=engine.clock, sleep=engine.sleep)
    assert found.timings[0].token_times == pytest.approx([1, 2, 3])
    assert found.timings[1].sent == 0.5
    assert found.timings[1].time_to_first_token == pytest.approx(3.5), "it waits for the first one"
    assert found.duration == pytest.approx(6.0)


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    engine = Clocked()
    found = drive(engine, requests(2, 1), arrivals=[0.0, 10.0], clock=engine.clock, sleep=engine.sleep)
    assert found.timings[1].token_times == pytest.approx([11.0])


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_closed_loop_keeps_so_many_in_flight(concurrency: int) -> None:
    engine, steps = Clocked(), []
    found = drive(
        engine, requests(7), concurrency=concurrency, each_step=lambda: steps.append(engine.now), clock=engine.clock
    )
    assert engine.most == min(7, concurrency)
    assert len(found.timings) == 7
    assert len(steps) == found.duration == 3 * math.ceil(7 / concurrency)


def test_a_failed_request_is_counted_and_the_others_go_on() -> None:
    engine = Clocked(fails=1)
    found = drive(engine, requests(3), concurrency=2, clock=engine.clock)
    assert sorted(found.timings) == [0, 2]
    assert found.errors == {1: "broken"}


def test_tokens_of_one_step_share_its_moment() -> None:
    engine = Clocked(per_step=2)
    found = drive(engine, requests(1), concurrency=1, clock=engine.clock)
    assert found.timings[0].token_times == [1.0, 1.0, 2.0]


def test_what_makes_no_sense_is_refused() -> None:
    engine = Clocked()
    for options in ({}, {"arrivals": [0.0], "concurrency": 1}, {"concurrency": 0}, {"arrivals": [0.0, 1.0]}):
        with pytest.raises(RequestError):
            drive(engine, requests(1), **options)  # type: ignore[arg-type]
    for call in (lambda: poisson_arrivals(0, 1), lambda: burst_arrivals(1.0, 4, burst=0)):
        with pytest.raises(RequestError):
            call()

"""Load on an engine: requests that arrive by a seeded process, or a fixed number in flight, and what became of them.

Open loop: requests come at given times, whatever the engine does; their waiting counts from those times, so a slow
engine cannot hide it. Closed loop: so many are in flight, and the next is sent when one ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.metrics.timing import RequestTiming
from gristmill.errors import RequestError


def poisson_arrivals(rate: float, number: int, *, seed: int = 0) -> list[float]:
    """Times of `number` arrivals at `rate` per second with exponential gaps, from 0. Raises RequestError for a rate
    that is not above 0."""
    if rate <= 0:
        raise RequestError(f"rate must be above 0 requests/s, got {rate}", field="rate")
    gaps = np.random.default_rng(seed).exponential(1 / rate, number)
    return [float(moment) for moment in np.cumsum(gaps) - gaps[:1].sum()]


def burst_arrivals(rate: float, number: int, *, burst: int, seed: int = 0) -> list[float]:
    """The same mean rate, in bursts of `burst` requests at one moment; the bursts are a Poisson process. Raises
    RequestError for a burst below 1."""
    if burst < 1:
        raise RequestError(f"burst must be at least 1, got {burst}", field="burst")
    moments = poisson_arrivals(rate / burst, -(-number // burst), seed=seed)
    return [moment for moment in moments for _ in range(burst)][:number]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A prompt of token ids and how to answer it."""

    prompt: list[int]
    params: SamplingParams


@dataclass(slots=True)
class LoadResult:
    """Timings of the requests that were answered, the errors of those that were not, by number, and the seconds from
    the start to the last token."""

    timings: dict[int, RequestTiming] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    duration: float = 0.0


class Target(Protocol):
    """What is loaded: an engine."""

    def add(self, prompt: list[int], params: SamplingParams, *, request_id: str | None = None) -> str:
        """Queue a request."""

    def step(self) -> list[RequestOutput]:
        """Compute one batch; the requests that advanced, each with all its output so far."""

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""


def drive(
    engine: Target,
    requests: Sequence[LoadRequest],
    *,
    arrivals: Sequence[float] | None = None,
    concurrency: int | None = None,
    each_step: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> LoadResult:
    """Send the requests and step the engine until all are answered.

    Give `arrivals`, seconds in ascending order, or `concurrency`. each_step is called after every step (to read a
    meter). Raises RequestError for both or neither, and for what the engine refuses.
    """
    if (arrivals is None) == (concurrency is None):
        raise RequestError("give arrivals or concurrency, and not both", field="concurrency")
    if concurrency is not None and concurrency < 1:
        raise RequestError(f"concurrency must be at least 1, got {concurrency}", field="concurrency")
    if arrivals is not None and (len(arrivals) != len(requests) or list(arrivals) != sorted(arrivals)):
        raise RequestError(f"{len(requests)} requests need as many ascending arrivals", field="arrivals")
    result, started = LoadResult(), clock()
    sent: dict[int, float] = {}
    tokens: dict[int, list[float]] = {}
    while len(result.timings) + len(result.errors) < len(requests):
        now = clock() - started
        while (number := len(sent)) < len(requests):
            in_flight = number - len(result.timings) - len(result.errors)
            if (arrivals[number] > now) if arrivals is not None else (in_flight >= (concurrency or 0)):
                break
            # an arrival counts from its own time, even when the engine was busy with a step then
            sent[number] = now if arrivals is None else arrivals[number]
            tokens[number] = []
            engine.add(requests[number].prompt, requests[number].params, request_id=str(number))
        if not engine.has_unfinished():
            assert arrivals is not None
            sleep(max(0.0, arrivals[len(sent)] - now))
            continue
        outputs = engine.step()
        result.duration = clock() - started
        if each_step is not None:
            each_step()
        for output in outputs:
            _record(output, requests, sent, tokens, result)
    return result


def _record(
    output: RequestOutput,
    requests: Sequence[LoadRequest],
    sent: dict[int, float],
    tokens: dict[int, list[float]],
    result: LoadResult,
) -> None:
    number = int(output.request_id)
    times, now = tokens[number], result.duration
    times += [now] * (sum(len(c.token_ids) for c in output.outputs) - len(times))
    if not output.finished:
        return
    failed = [c.error or "error" for c in output.outputs if c.finish_reason == "error"]
    if failed or not times:
        result.errors[number] = failed[0] if failed else "no token came"
    else:
        result.timings[number] = RequestTiming(sent[number], times, len(requests[number].prompt))

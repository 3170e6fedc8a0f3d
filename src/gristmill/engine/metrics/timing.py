"""Latency and throughput of requests, from the moments at which their tokens came.

One request: TTFT (time to first token, waiting included), ITL (the list of gaps between tokens), TPOT (their mean),
latency = TTFT + all gaps, and tokens per second of its user. All requests: tokens and requests per second of the whole
system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gristmill.errors import RequestError


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When a request was sent and when each of its output tokens came, in seconds on one clock.

    Raises RequestError for no token, or for times that go backwards.
    """

    sent: float
    token_times: Sequence[float]
    prompt_tokens: int

    def __post_init__(self) -> None:
        if not self.token_times:
            raise RequestError("a request without an output token has no timing", field="token_times")
        if any(later < earlier for earlier, later in pairwise((self.sent, *self.token_times))):
            raise RequestError("the tokens' times go backwards", field="token_times")

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first token: waiting, prefill and one choice."""
        return self.token_times[0] - self.sent

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds before each token after the first."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def time_per_output_token(self) -> float | None:
        """Mean of the gaps, (latency - TTFT) / (n - 1); None for a single token."""
        gaps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / gaps if gaps else None

    @property
    def latency(self) -> float:
        """Seconds from sending to the last token."""
        return self.token_times[-1] - self.sent

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens over latency, as the request's user sees it; None when no time passed."""
        return len(self.token_times) / self.latency if self.latency else None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Mean and percentiles, between neighbours by linear interpolation."""

    mean: float
    p50: float
    p95: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """Mean, p50, p95 and p99; None of nothing."""
    if not values:
        return None
    return Percentiles(float(np.mean(values)), *(float(x) for x in np.percentile(values, (50, 95, 99))))


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A load of requests. Seconds and rates; percentiles are over requests, those of the gaps over all gaps."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    duration: float
    request_throughput: float
    """Requests per second."""
    output_throughput: float
    """Output tokens of all requests per second: the system's tokens per second."""
    total_throughput: float
    """Prompt and output tokens per second."""
    time_to_first_token: Percentiles
    inter_token_latency: Percentiles | None
    """None when every request has a single token."""
    time_per_output_token: Percentiles | None
    latency: Percentiles
    tokens_per_second: Percentiles | None
    """Of single requests, as their users see it."""

    def as_dict(self) -> dict[str, Any]:
        """Values that JSON takes."""
        return asdict(self)


def summarise(timings: Sequence[RequestTiming], duration: float | None = None) -> LoadSummary:
    """Summary of finished requests. duration: seconds of the whole load; None counts from the first sending to the last
    token. Raises RequestError for no request or no time."""
    if not timings:
        raise RequestError("no request was finished: there is nothing to summarise", field="timings")
    if duration is None:
        duration = max(t.token_times[-1] for t in timings) - min(t.sent for t in timings)
    if duration <= 0:
        raise RequestError(f"the load took {duration} seconds: rates need more", field="duration")
    prompt, output = sum(t.prompt_tokens for t in timings), sum(len(t.token_times) for t in timings)
    first, latency = percentiles([t.time_to_first_token for t in timings]), percentiles([t.latency for t in timings])
    assert first is not None
    assert latency is not None
    return LoadSummary(
        requests=len(timings),
        prompt_tokens=prompt,
        output_tokens=output,
        duration=duration,
        request_throughput=len(timings) / duration,
        output_throughput=output / duration,
        total_throughput=(prompt + output) / duration,
        time_to_first_token=first,
        inter_token_latency=percentiles([gap for t in timings for gap in t.inter_token_latencies]),
        time_per_output_token=percentiles([x for t in timings if (x := t.time_per_output_token) is not None]),
        latency=latency,
        tokens_per_second=percentiles([x for t in timings if (x := t.tokens_per_second) is not None]),
    )

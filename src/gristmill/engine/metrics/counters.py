"""What an engine counts while it runs: plain integers and histograms, cheap enough for every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

EDGES = tuple(1e-5 * 2.0**power for power in range(24))
"""Upper edges of the buckets of a histogram: 10 microseconds to 84 seconds."""


@dataclass(slots=True)
class Histogram:
    """Seconds in buckets that double in width; the last holds all above the last edge."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    number: int = 0
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(EDGES, seconds)] += 1
        self.number += 1
        self.total += seconds

    def below(self, share: float) -> float | None:
        """The bucket edge under which this share of the durations lies; infinite above the last, None of nothing."""
        if not self.number:
            return None
        seen = 0
        for edge, count in zip((*EDGES, float("inf")), self.counts, strict=True):
            seen += count
            if seen >= share * self.number:
                return edge
        return float("inf")

    def snapshot(self) -> dict[str, Any]:
        """Number, sum and mean of the seconds, and the filled buckets by their upper edge."""
        edges = (*map(str, EDGES), "+Inf")
        return {
            "number": self.number,
            "sum": self.total,
            "mean": self.total / self.number if self.number else None,
            "buckets": {edge: count for edge, count in zip(edges, self.counts, strict=True) if count},
        }


@dataclass(slots=True)
class EngineMetrics:
    """Totals since the engine began, gauges of now, and where the seconds of its steps went."""

    steps: int = 0
    scheduled_tokens: int = 0
    """Tokens computed, those computed again after a preemption included."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of these, found in the prefix cache."""
    generated_tokens: int = 0
    preempted: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished_requests: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0
    queue_seconds: Histogram = field(default_factory=Histogram)
    """From a sequence's arrival to its first step."""
    schedule_seconds: Histogram = field(default_factory=Histogram)
    forward_seconds: Histogram = field(default_factory=Histogram)
    sample_seconds: Histogram = field(default_factory=Histogram)

    @contextmanager
    def timed(self, part: Histogram) -> Iterator[None]:
        """Add the seconds of the block to one of the histograms."""
        started = perf_counter()
        try:
            yield
        finally:
            part.add(perf_counter() - started)

    @property
    def cache_hit_rate(self) -> float | None:
        """Share of prompt tokens that the prefix cache held; None before the first prompt."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def acceptance(self) -> float | None:
        """Share of draft tokens that were accepted; None without drafts."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def overhead(self) -> float | None:
        """Share of the steps' seconds that went into scheduling and sampling; None before the first step."""
        own = self.schedule_seconds.total + self.sample_seconds.total
        whole = own + self.forward_seconds.total
        return own / whole if whole else None

    def snapshot(self) -> dict[str, Any]:
        """All of it as values that JSON takes."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        facts |= {name: part.snapshot() for name, part in facts.items() if isinstance(part, Histogram)}
        rates = {"cache_hit_rate": self.cache_hit_rate, "acceptance": self.acceptance, "overhead": self.overhead}
        return facts | rates

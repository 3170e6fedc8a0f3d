"""A benchmark report: quality beside efficiency, of one and the same run, and two such reports side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gristmill.engine.metrics.timing import LoadSummary


@dataclass(frozen=True, slots=True)
class Quality:
    """How well the model foretells a text. perplexity is exp of the mean nats per token."""

    perplexity: float
    tokens: int
    text: str
    """Where the text is from."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. peak is measured, None where the system does not tell; weights and cache are what the formulas ask for."""

    weights: int
    cache: int
    peak: int | None


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of the run, None where nothing can be read; `source` says what was measured, or why nothing was."""

    joules: float | None
    joules_per_token: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase on the roofline: operations per byte read, what binds, the seconds a step must take at least, and those
    that it took (the median)."""

    intensity: float
    bound: str
    least_seconds: float
    seconds: float

    @property
    def share(self) -> float:
        """Of the speed that the roofline allows."""
        return self.least_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Point:
    """One load: its kind in words, and the rate or the concurrency; slots_busy: mean share of the seats in use."""

    load: str
    level: float
    summary: LoadSummary
    errors: int
    slots_busy: float
    decode: Phase | None
    """Of a step of the whole batch; None where no request has a second token."""
    energy: Energy
    dollars_per_million_tokens: float | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All of a run. machine: operations and bytes per second that it reaches."""

    model: str
    options: dict[str, Any]
    provenance: dict[str, str]
    machine: dict[str, float]
    quality: Quality
    memory: Memory
    prefill: Phase
    """Of one prompt on an idle engine."""
    points: list[Point]
    path: str
    """What computed the steps, in words."""
    engine: dict[str, Any]
    """The engine's own counters at the end."""

    def as_dict(self) -> dict[str, Any]:
        """Values that JSON takes; each phase with its share."""
        facts = asdict(self)
        facts["prefill"]["share"] = self.prefill.share
        for point, own in zip(facts["points"], self.points, strict=True):
            if own.decode is not None:
                point["decode"]["share"] = own.decode.share
        return facts


def compare_reports(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Two deployments, reports read back from JSON, by what one chooses between: quality, latency, throughput, energy,
    money and storage. The last point of each is taken."""
    return {name: (_dig(a, path), _dig(b, path)) for name, path in _COMPARED.items()}


_COMPARED = {
    "perplexity": ("quality", "perplexity"),
    "TTFT p50, s": ("points", -1, "summary", "time_to_first_token", "p50"),
    "ITL p50, s": ("points", -1, "summary", "inter_token_latency", "p50"),
    "latency p50, s": ("points", -1, "summary", "latency", "p50"),
    "output tokens/s": ("points", -1, "summary", "output_throughput"),
    "J/token": ("points", -1, "energy", "joules_per_token"),
    "dollars per 1M tokens": ("points", -1, "dollars_per_million_tokens"),
    "weights, bytes": ("memory", "weights"),
    "peak memory, bytes": ("memory", "peak"),
}


def _dig(value: Any, path: Sequence[str | int]) -> float | None:
    for step in path:
        if value is None:
            return None
        value = value[step]
    return None if value is None else float(value)

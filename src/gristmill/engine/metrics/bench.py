"""Measure an engine under load: one point for each rate or concurrency, each placed on the machine's roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, Protocol

import numpy as np

from gristmill.core import SamplingParams
from gristmill.engine.metrics.cost import EnergyMeter, dollars_per_million_tokens
from gristmill.engine.metrics.counters import EngineMetrics
from gristmill.engine.metrics.load import LoadRequest, Target, burst_arrivals, drive, poisson_arrivals
from gristmill.engine.metrics.report import Energy, Phase, Point
from gristmill.engine.metrics.roofline import Machine, forward_work, place
from gristmill.engine.metrics.timing import summarise
from gristmill.errors import MissingExtra, RequestError
from gristmill.model.config import ModelConfig


class Measured(Target, Protocol):
    """An engine that counts."""

    @property
    def metrics(self) -> EngineMetrics:
        """Its counters."""


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """Random prompts, the first `shared_prefix` tokens of which are the same, and answers of exactly `output_tokens`.

    Raises RequestError, naming the field, for a number out of range.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)
        if not 0 <= self.shared_prefix <= self.prompt_tokens:
            raise RequestError(
                f"shared_prefix must be in [0, {self.prompt_tokens}], got {self.shared_prefix}", field="shared_prefix"
            )

    def draw(self, vocab_size: int, *, stream: int = 0) -> list[LoadRequest]:
        """The requests, greedy; another stream has other tokens behind the shared ones."""
        shared = np.random.default_rng((self.seed, 0)).integers(vocab_size, size=self.shared_prefix)
        own = np.random.default_rng((self.seed, 1, stream))
        size = self.prompt_tokens - self.shared_prefix
        params = SamplingParams(temperature=0.0, max_tokens=self.output_tokens, ignore_eos=True)
        return [
            LoadRequest([*shared.tolist(), *own.integers(vocab_size, size=size).tolist()], params)
            for _ in range(self.requests)
        ]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measurement needs to know of model and machine. bytes_per_weight: as the weights lie in memory."""

    config: ModelConfig
    machine: Machine
    bytes_per_weight: float
    bytes_per_kv: int
    seats: int
    """Most sequences that the engine runs at once."""
    meter: EnergyMeter | None = None
    energy_source: str = ""
    dollars_per_hour: float | None = None

    def phase(self, chunks: list[tuple[int, int]], seconds: float) -> Phase:
        """A forward over (cached, new) tokens that took so many seconds."""
        work = forward_work(
            self.config,
            chunks,
            bytes_per_weight=self.bytes_per_weight,
            bytes_per_kv=self.bytes_per_kv,
            logits=len(chunks),
        )
        placed = place(work, self.machine)
        return Phase(placed.intensity, placed.bound, placed.seconds, seconds)


def measure_prefill(
    engine: Measured, shape: LoadShape, conditions: Conditions, *, clock: Callable[[], float] = perf_counter
) -> Phase:
    """A prompt alone on an idle engine, three times after a first one that warms up: the median."""
    single = LoadShape(requests=4, prompt_tokens=shape.prompt_tokens, output_tokens=1, seed=shape.seed)
    result = drive(engine, single.draw(conditions.config.vocab_size, stream=1 << 20), concurrency=1, clock=clock)
    seconds = [result.timings[number].time_to_first_token for number in (1, 2, 3)]
    return conditions.phase([(0, shape.prompt_tokens)], statistics.median(seconds))


def measure_point(
    engine: Measured,
    shape: LoadShape,
    conditions: Conditions,
    *,
    arrivals: Literal["closed", "poisson", "burst"],
    level: float,
    burst: int = 1,
    stream: int = 0,
    clock: Callable[[], float] = perf_counter,
) -> Point:
    """One load. level: requests in flight for "closed" (a whole number), requests per second otherwise.

    Raises RequestError for a level or burst out of range, and when not one request is answered.
    """
    requests = shape.draw(conditions.config.vocab_size, stream=stream)
    moments = None
    if arrivals == "poisson":
        moments = poisson_arrivals(level, shape.requests, seed=shape.seed)
    elif arrivals == "burst":
        moments = burst_arrivals(level, shape.requests, burst=burst, seed=shape.seed)
    running: list[int] = []
    finished = engine.metrics.finished_requests
    meter = conditions.meter
    before = meter.joules() if meter else 0.0

    def each_step() -> None:
        nonlocal finished
        # those that this step ended are no longer running after it
        running.append(engine.metrics.running + engine.metrics.finished_requests - finished)
        finished = engine.metrics.finished_requests
        if meter:
            meter.joules()  # so that no counter wraps unseen between two readings

    concurrency = int(level) if moments is None else None
    result = drive(engine, requests, arrivals=moments, concurrency=concurrency, each_step=each_step, clock=clock)
    joules = meter.joules() - before if meter else None
    if not result.timings:
        raise RequestError(f"no request was answered. The first one: {result.errors[0]}", field="requests")
    summary = summarise([result.timings[number] for number in sorted(result.timings)], result.duration)
    seats = min(conditions.seats, concurrency or conditions.seats)
    batch = max(1, round(statistics.mean(running)))
    gap = summary.inter_token_latency
    chunks = [(shape.prompt_tokens + shape.output_tokens // 2, 1)] * batch
    price = conditions.dollars_per_hour
    return Point(
        load={"closed": "in flight", "poisson": "requests/s", "burst": f"requests/s in bursts of {burst}"}[arrivals],
        level=level,
        summary=summary,
        errors=len(result.errors),
        slots_busy=statistics.mean(running) / seats,
        decode=conditions.phase(chunks, gap.p50) if gap and gap.p50 > 0 else None,
        energy=Energy(joules, joules / summary.output_tokens if joules is not None else None, conditions.energy_source),
        dollars_per_million_tokens=(
            None if price is None else dollars_per_million_tokens(price, summary.output_throughput)
        ),
    )


def plot_points(points: list[Point], path: Path, *, kind: str) -> None:
    """Output tokens per second against median latency, one mark for each load. kind: svg, png or pdf. Raises
    MissingExtra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "evaluate") from error
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    latency = [point.summary.latency.p50 for point in points]
    throughput = [point.summary.output_throughput for point in points]
    axes.plot(latency, throughput, marker="o")
    for x, y, point in zip(latency, throughput, points, strict=True):
        axes.annotate(f"{point.level:g}", (x, y), textcoords="offset points", xytext=(6, -10))
    axes.set(xlabel="median latency of a request, s", ylabel="output tokens/s", title=f"each mark: {points[0].load}")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, format=kind)

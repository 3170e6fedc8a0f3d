"""What the server and its engines count, as Prometheus reads it.

Nothing is copied while requests run: a scrape reads the counts where they are. Those of an engine are integers that
its thread replaces one at a time, so a scrape may see some of a step and not the rest, and never a torn number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gristmill import __version__
from gristmill.engine.metrics.counters import EDGES, EngineMetrics, Histogram
from gristmill.serve.access.traffic import Traffic
from gristmill.serve.host import Slot

ENGINE_TOTALS = {
    "steps": "Steps of the engine.",
    "scheduled_tokens": "Tokens computed, those computed again after a preemption included.",
    "prompt_tokens": "Prompt tokens of admitted sequences.",
    "cached_prompt_tokens": "Prompt tokens that the prefix cache held.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens drafted by speculation.",
    "accepted_tokens": "Drafted tokens that were accepted.",
    "preempted": "Sequences that gave their blocks to others and began again.",
    "finished_requests": "Requests that the engine finished.",
}
ENGINE_GAUGES = {"running": "Sequences in the step.", "waiting": "Sequences that wait for a seat or blocks."}


def registry_of(traffic: Traffic, slots: Callable[[], Mapping[str, Slot]]) -> CollectorRegistry:
    """A registry of one server: its traffic, the engines of its models, and the process's memory and time."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counts(traffic, slots))
    ProcessCollector(registry=registry)
    return registry


def engines(slots: Mapping[str, Slot]) -> Iterator[tuple[str, EngineMetrics]]:
    """The engines in service, each under the first name of its model."""
    seen: set[int] = set()
    for name, slot in slots.items():
        if slot.hosted is None or slot.hosted.engine is None:
            continue
        metrics = getattr(slot.hosted.generator.engine, "metrics", None)
        if isinstance(metrics, EngineMetrics) and id(metrics) not in seen:
            seen.add(id(metrics))
            yield name, metrics


class _Counts(Collector):
    def __init__(self, traffic: Traffic, slots: Callable[[], Mapping[str, Slot]]) -> None:
        self.traffic, self.slots = traffic, slots

    def collect(self) -> Iterator[Metric]:
        """All families, as the registry asks for them."""
        build = GaugeMetricFamily("gristmill_build_info", "The version of the server.", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield from self._of_requests()
        yield from self._of_models()
        yield from self._of_engines()

    def _of_requests(self) -> Iterator[Metric]:
        traffic = self.traffic
        requests = CounterMetricFamily(
            "gristmill_requests", "Requests by method, route and status.", labels=["method", "route", "status"]
        )
        for (method, route, status), count in traffic.requests.items():
            requests.add_metric([method, route, str(status)], count)
        yield requests
        yield GaugeMetricFamily("gristmill_requests_open", "Requests that are not over.", value=traffic.open)
        yield _histogram("gristmill_request_seconds", "Time of a request.", "route", traffic.seconds)

    def _of_models(self) -> Iterator[Metric]:
        traffic = self.traffic
        ready = GaugeMetricFamily("gristmill_model_ready", "Whether a model is loaded.", labels=["model"])
        for name, slot in self.slots().items():
            ready.add_metric([name], float(slot.hosted is not None))
        yield ready
        running = GaugeMetricFamily("gristmill_model_requests", "Requests that a model answers now.", labels=["model"])
        for name, count in traffic.running.items():
            running.add_metric([name], count)
        yield running
        tokens = CounterMetricFamily("gristmill_tokens", "Tokens of requests that are over.", labels=["model", "kind"])
        for (name, kind), count in traffic.tokens.items():
            tokens.add_metric([name, kind], count)
        yield tokens
        left = CounterMetricFamily("gristmill_requests_aborted", "Requests whose client left.", labels=["model"])
        for name, count in traffic.left.items():
            left.add_metric([name], count)
        yield left
        first, between = traffic.first_token, traffic.between_tokens
        yield _histogram("gristmill_time_to_first_token_seconds", "From request to first token.", "model", first)
        yield _histogram("gristmill_inter_token_seconds", "From a token of an answer to the next.", "model", between)

    def _of_engines(self) -> Iterator[Metric]:
        found = dict(engines(self.slots()))
        for field, purpose in ENGINE_TOTALS.items():
            total = CounterMetricFamily(f"gristmill_engine_{field}", purpose, labels=["model"])
            for name, metrics in found.items():
                total.add_metric([name], getattr(metrics, field))
            yield total
        for field, purpose in ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(f"gristmill_engine_{field}", purpose, labels=["model"])
            for name, metrics in found.items():
                gauge.add_metric([name], getattr(metrics, field))
            yield gauge
        blocks = GaugeMetricFamily("gristmill_engine_blocks", "Blocks of the cache.", labels=["model", "state"])
        for name, metrics in found.items():
            for state in ("used", "cached", "free"):
                blocks.add_metric([name, state], getattr(metrics, f"blocks_{state}"))
        yield blocks
        queue = {name: metrics.queue_seconds for name, metrics in found.items()}
        yield _histogram("gristmill_engine_queue_seconds", "From arrival to a sequence's first step.", "model", queue)
        for part in ("schedule", "forward", "sample"):
            seconds = {name: getattr(metrics, f"{part}_seconds") for name, metrics in found.items()}
            yield _histogram(f"gristmill_engine_{part}_seconds", f"The {part} part of a step.", "model", seconds)


def _histogram(name: str, purpose: str, label: str, parts: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, purpose, labels=[label])
    edges = (*(f"{edge:g}" for edge in EDGES), "+Inf")
    for value, histogram in parts.items():
        # the total of the copy, not `number`, which another thread may have raised meanwhile
        buckets = list(zip(edges, accumulate(histogram.counts), strict=True))
        family.add_metric([value], buckets, histogram.total)
    return family

"""Starts the workers of a model, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from gristmill.errors import RequestError
from gristmill.serve.routing.feed import Replica
from gristmill.serve.routing.process import EngineProcess
from gristmill.serve.routing.ray_replica import RayCluster
from gristmill.serve.routing.routed import RoutedEngine, RoutedModel


def start_workers(
    model: str,
    options: Mapping[str, Any],
    *,
    workers: int,
    on: Literal["processes", "ray"] = "processes",
    name: str | None = None,
    threads: int | None = None,
) -> RoutedModel:
    """Start so many workers and wait until all have loaded the model. Its engine's `close` ends them.

    options: of `LLM`. name: of the model in requests. threads: of a forward in each; None shares the cores.
    Raises RequestError for fewer than one worker, MissingExtra without ray, and what `LLM` raises in them.
    """
    if workers < 1:
        raise RequestError(f"workers must be at least 1, got {workers}", field="workers")
    threads = threads or max(1, torch.get_num_threads() // workers)
    replicas: list[Replica] = []
    if on == "ray":
        replicas += RayCluster().start(model, options, replicas=workers, threads=threads)
    else:
        replicas += [EngineProcess(model, options, threads=threads) for _ in range(workers)]
    try:
        for replica in replicas:
            _ = replica.about  # waits
        return RoutedModel(name or model, RoutedEngine(replicas))
    except BaseException:
        for replica in replicas:
            replica.close()
        raise

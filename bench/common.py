"""Paired timing: the two sides take turns in one process, so that a busy machine disturbs both alike."""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def paired_seconds(sides: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by side; one call of each side first, unmeasured, warms up."""
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def rates(seconds: dict[str, list[float]], units: int) -> dict[str, float]:
    """Units per second by side, from the median."""
    return {name: round(units / statistics.median(values), 1) for name, values in seconds.items()}


def finish(result: dict[str, Any]) -> None:
    """Print the result as the last line of standard output."""
    print(json.dumps(result))

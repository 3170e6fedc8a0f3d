"""What more devices bring, and what waiting costs: efficiency, the slowest worker, communication beside computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gristmill.errors import DataError, RequestError


@dataclass(frozen=True)
class Scaling:
    """A step on a number of devices. speed_up: T_1 / T_N; efficiency: T_1 / (N T_N), 1 when N devices are N times as
    fast."""

    devices: int
    seconds: float
    samples_per_second: float
    speed_up: float
    efficiency: float


def throughput_report(seconds: Mapping[int, float], samples: int) -> list[Scaling]:
    """One line for each number of devices, ascending, from the seconds that the same `samples` took on it.

    Raises DataError when the time on 1 device is missing, or a time or number is not above 0.
    """
    if 1 not in seconds:
        raise DataError(f"efficiency is measured against 1 device, found times for {sorted(seconds)} only")
    if samples < 1 or min(seconds) < 1 or min(seconds.values()) <= 0:
        raise DataError(f"samples, devices and seconds must be above 0, got {samples} samples and {dict(seconds)}")
    single = seconds[1]
    return [
        Scaling(devices, took, samples / took, single / took, single / (devices * took))
        for devices, took in sorted(seconds.items())
    ]


def report_markdown(lines: Sequence[Scaling]) -> str:
    """The report as a table."""
    head = "| devices | seconds | samples/s | speed-up | efficiency |\n|---:|---:|---:|---:|---:|"
    rows = (
        f"| {line.devices} | {line.seconds:.4g} | {line.samples_per_second:.4g} | {line.speed_up:.2f} | "
        f"{line.efficiency:.0%} |"
        for line in lines
    )
    return "\n".join((head, *rows))


def synchronous_step(
    compute: Sequence[float], communication: float = 0.0, *, buckets: int = 1, overlap: bool = False
) -> float:
    """Seconds of a step in which all workers wait for each other: `compute[w]` is worker w's time, `communication` the
    time to sum all gradients once all are there.

    Gradients are ready in `buckets` equal parts, evenly over a worker's time. Without `overlap` summing begins after
    the last; with it, a part is summed as soon as every worker has it and the part before is through.
    Raises RequestError for no worker, a negative time or no bucket.
    """
    if not compute or min([*compute, communication]) < 0 or buckets < 1:
        raise RequestError(
            f"give the time of one worker or more, none negative, and a bucket or more; got {list(compute)}, "
            f"communication {communication}, buckets {buckets}"
        )
    slowest = max(compute)
    if not overlap:
        return slowest + communication
    through = 0.0
    for part in range(1, buckets + 1):
        through = max(through, slowest * part / buckets) + communication / buckets
    return through

"""Energy and money: joules from a power trace or a counter of the machine, and dollars per million tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from gristmill.errors import RequestError


def energy(trace: Sequence[tuple[float, float]]) -> float:
    """Joules under (seconds, watts) samples in order of time, by the trapezoidal rule.

    Raises RequestError for fewer than two samples, or times that go backwards.
    """
    if len(trace) < 2:
        raise RequestError(f"energy needs two samples of power or more, got {len(trace)}", field="trace")
    if any(later[0] < earlier[0] for earlier, later in pairwise(trace)):
        raise RequestError("the samples' times go backwards", field="trace")
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(trace))


def dollars_per_million_tokens(dollars_per_hour: float, tokens_per_second: float) -> float:
    """Price of a million tokens on a machine that costs so much and makes so many. Raises RequestError for a negative
    price or no tokens."""
    if dollars_per_hour < 0 or tokens_per_second <= 0:
        raise RequestError(
            f"a price of 0 or more and a rate above 0 are needed, got {dollars_per_hour} dollars an hour and "
            f"{tokens_per_second} tokens/s",
            field="dollars_per_hour" if dollars_per_hour < 0 else "tokens_per_second",
        )
    return dollars_per_hour / (tokens_per_second * 3600) * 1e6


class EnergyMeter(Protocol):
    """Energy drawn so far. Read it often: a counter may wrap, and sampled power is integrated between the readings."""

    @property
    def source(self) -> str:
        """What is measured, in words."""

    def joules(self) -> float:
        """Joules since the meter was made."""


class SampledPower:
    """Integrates what `watts()` says at every reading."""

    def __init__(self, watts: Callable[[], float], *, source: str, clock: Callable[[], float] = perf_counter) -> None:
        self.source = source
        self._watts, self._clock = watts, clock
        self._last, self._total = (clock(), watts()), 0.0

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        now = (self._clock(), self._watts())
        self._total += energy((self._last, now))
        self._last = now
        return self._total


class Rapl:
    """The processors' own counters (RAPL), in /sys/class/powercap; each wraps at its range."""

    source = "processor packages (RAPL)"

    def __init__(self, packages: Sequence[Path]) -> None:
        self._packages = [(path / "energy_uj", int((path / "max_energy_range_uj").read_text())) for path in packages]
        self._last = [int(path.read_text()) for path, _ in self._packages]
        self._total = 0

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        for place, (path, highest) in enumerate(self._packages):
            now = int(path.read_text())
            self._total += (now - self._last[place]) % (highest + 1)
            self._last[place] = now
        return self._total / 1e6


class Nvml:
    """The counter of one NVIDIA device."""

    source = "NVIDIA device (NVML)"

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._device = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        self._begin = self._millijoules()

    def joules(self) -> float:
        """See `EnergyMeter.joules`."""
        return (self._millijoules() - self._begin) / 1e3

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))


def find_meter(device: str = "cpu", *, root: Path = Path("/sys/class/powercap")) -> tuple[EnergyMeter | None, str]:
    """The meter of the device and what it measures; or None and why there is none."""
    if device.startswith("cuda"):
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
            meter = Nvml(pynvml, int(device.partition(":")[2] or 0))
        except ImportError:
            return None, "nvidia-ml-py is not installed: pip install nvidia-ml-py"
        except Exception as error:  # NVML's errors are of a class of its own
            return None, f"NVML cannot be read: {error}"
        return meter, meter.source
    packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not packages:
        return None, f"this machine shows no energy counter ({root}/intel-rapl:*)"
    try:
        return Rapl(packages), Rapl.source
    except (OSError, ValueError) as error:
        return None, f"the energy counter cannot be read: {error}. It is often readable by root alone."

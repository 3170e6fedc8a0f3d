"""Memory of inference: what weights, keys and values must take, and what the process took at its highest."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

from gristmill.model.accounting import kv_bytes
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


def weight_bytes(config: ModelConfig, bytes_per_weight: float = 4.0) -> int:
    """All weights of a decoder; a tied matrix counts once."""
    with torch.device("meta"):
        return round(Transformer(config).count_parameters() * bytes_per_weight)


def cache_bytes(config: ModelConfig, tokens: int, sequences: int = 1, bytes_per_value: int = 4) -> int:
    """Keys and values of so many sequences of so many tokens: 2 * layers * kv_heads * head_dim * tokens * sequences *
    bytes_per_value for plain attention; windows, latent and shared layers take less (`accounting.kv_bytes`)."""
    return sequences * kv_bytes(config, tokens, bytes_per_value)


class PeakMemory:
    """Most memory that was taken between making it and `peak`, above what was taken before.

    Of the device's allocator on CUDA; elsewhere of the whole process, as Linux counts it (None on other systems).
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        except OSError:
            self._before = None
        else:
            self._before = _status("VmRSS")

    def peak(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        if self._before is None:
            return None
        if self._device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        highest = _status("VmHWM")
        return None if highest is None else highest - self._before


def give_back_freed() -> None:
    """Return to the system what this process has freed: glibc keeps it between what is in use, a quarter of all that
    the process has after SmolLM2 was loaded. Does nothing with another C library."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None

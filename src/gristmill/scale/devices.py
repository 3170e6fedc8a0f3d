"""What named devices can do, and how long work takes on them.

Peaks are dense bfloat16 products (vendors often print the double, with sparsity). No run reaches them: the share that
it does reach is its model FLOP utilisation (MFU), an assumption of every estimate here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.errors import GristmillError, closest

MFU = 0.4
"""Assumed where nothing was measured: what well-made training reaches on GPUs. Source: Chowdhery et al. 2023, table 3
(PaLM 46%, others 20 to 33%)."""


@dataclass(frozen=True)
class Device:
    """Peak dense bfloat16 FLOP/s, bytes of memory, bytes/s between memory and cores."""

    name: str
    flops: float
    memory: float
    bandwidth: float

    def seconds(self, flops: float, *, devices: int = 1, mfu: float = MFU) -> float:
        """Time for so many operations at an assumed utilisation."""
        return flops / (devices * self.flops * mfu)


DEVICES = (
    Device("h200", 989e12, 141e9, 4.80e12),  # NVIDIA H200 SXM data sheet, 2024
    Device("h100", 989e12, 80e9, 3.35e12),  # NVIDIA H100 SXM data sheet, 2022
    Device("a100-80gb", 312e12, 80e9, 2.04e12),  # NVIDIA A100 80GB SXM data sheet, 2021
    Device("a100-40gb", 312e12, 40e9, 1.56e12),  # NVIDIA A100 40GB data sheet, 2020
    Device("l40s", 362e12, 48e9, 0.864e12),  # NVIDIA L40S data sheet, 2023
    Device("l4", 121e12, 24e9, 0.300e12),  # NVIDIA L4 data sheet, 2023
    Device("mi300x", 1307e12, 192e9, 5.30e12),  # AMD Instinct MI300X data sheet, 2023
    Device("rtx-4090", 165e12, 24e9, 1.01e12),  # NVIDIA Ada GPU architecture paper, 2022; float32 sums
    Device("rtx-3090", 71e12, 24e9, 0.936e12),  # NVIDIA Ampere GA102 paper, 2021; float32 sums
    Device("laptop-cpu", 0.2e12, 16e9, 0.05e12),  # an assumption: four cores with AVX2 in float32, two DDR4 channels
)


def device(name: str) -> Device:
    """A device by name. Raises GristmillError with the closest names."""
    for found in DEVICES:
        if found.name == name.lower():
            return found
    names = [found.name for found in DEVICES]
    raise GristmillError(
        f"unknown device {name!r}.{closest(name.lower(), names)} Known: {', '.join(names)}. "
        "Give --peak_tflops and --memory_gb for another one."
    )

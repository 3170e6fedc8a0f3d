"""What a forward must compute and read, and which of the two binds on a machine.

A linear layer does 2 operations per weight and token and reads each weight once per forward, whatever the tokens: its
intensity grows with the tokens of a forward. Prefill has many of them and is bound by computing; decoding one sequence
has one, and also reads all earlier keys and values, so it is bound by memory until a batch is large enough.

Source: Williams et al. 2009 (roofline).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gristmill.errors import RequestError
from gristmill.model.accounting import flops_per_token, kv_bytes, matrix_parameters
from gristmill.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes read, of one forward or of several added up."""

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.linear_flops + self.attention_flops

    @property
    def bytes(self) -> float:
        """All bytes read."""
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """Operations per byte read."""
        return self.flops / self.bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear_flops + other.linear_flops,
            self.attention_flops + other.attention_flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
        )


def forward_work(
    config: ModelConfig,
    chunks: Sequence[tuple[int, int]],
    *,
    bytes_per_weight: float = 4.0,
    bytes_per_kv: int = 4,
    logits: int | None = None,
) -> Work:
    """One forward over chunks (tokens already in the cache, new tokens), each of a sequence of its own.

    logits: how many tokens need the output head; None is all. Activations are taken to stay in the processor's caches;
    of a mixture of experts only those of one token are read, which is the least there can be.
    """
    new = sum(count for _, count in chunks)
    head = config.vocab_size * config.hidden_size if config.causal else 0
    body = matrix_parameters(config) - head
    linear = 2.0 * (body * new + head * (new if logits is None else logits))
    per_weight = 2.0 * matrix_parameters(config)
    attention = sum(
        count * (flops_per_token(config, start + (count + 1) / 2, training=False) - per_weight)
        for start, count in chunks
    )
    kv = sum(kv_bytes(config, start + count, bytes_per_kv) for start, count in chunks)
    return Work(linear, attention, bytes_per_weight * (body + head), kv)


def prefill_work(config: ModelConfig, tokens: int, **options: float | int | None) -> Work:
    """One forward over a whole prompt; options as in `forward_work`."""
    return forward_work(config, [(0, tokens)], **options)  # type: ignore[arg-type]


def decode_work(config: ModelConfig, steps: int, *, context: int = 0, batch: int = 1, **options: float | int) -> Work:
    """`steps` forwards of one token for each of `batch` sequences that begin with `context` tokens."""
    total = Work()
    for step in range(steps):
        total += forward_work(config, [(context + step, 1)] * batch, **options)  # type: ignore[arg-type]
    return total


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine reaches: operations per second in a large matrix product, bytes per second when reading."""

    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """Operations per byte from which on computing binds."""
        return self.flops / self.bandwidth


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a piece of work lies on a machine's roofline: the bound, and the least seconds it allows."""

    intensity: float
    bound: Literal["memory", "compute"]
    seconds: float


def place(work: Work, machine: Machine) -> Placement:
    """The bound of a forward: the larger of computing and reading, which overlap at best."""
    bound: Literal["memory", "compute"] = "memory" if work.intensity < machine.ridge else "compute"
    return Placement(work.intensity, bound, max(work.flops / machine.flops, work.bytes / machine.bandwidth))


def measure_machine(
    device: str = "cpu", *, dtype: torch.dtype = torch.float32, megabytes: int = 256, size: int = 1024, rounds: int = 5
) -> Machine:
    """The best of `rounds` readings of a buffer beyond the caches, and of square matrix products, on all threads that
    torch may use. Raises RequestError for a size below 1."""
    if min(megabytes, size, rounds) < 1:
        raise RequestError("megabytes, size and rounds must be at least 1", field="rounds")
    buffer = torch.ones(megabytes << 18, device=device)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    reading = _fastest(buffer.sum, device, rounds)
    computing = _fastest(lambda: matrix @ matrix, device, rounds)
    return Machine(2 * size**3 / computing, buffer.nbytes / reading)


def _fastest(work: Callable[[], object], device: str, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])

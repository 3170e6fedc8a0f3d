"""Figures of a run that tell early when it goes wrong, and alarms on them. All go into metrics.jsonl.

Limits in `LIMITS` are rules of thumb for warnings, not bounds that a healthy run never crosses.
"""

from __future__ import annotations

import fnmatch
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.model.accounting import flops_per_token as model_flops_per_token
from gristmill.model.config import ModelConfig
from gristmill.train.callbacks import Callback, Run
from gristmill.train.watch.activations import finite

_LAYER = re.compile(r"(.*?\blayers\.\d+)\.")


class WeightMonitor(Callback):
    """Records every `every` steps, by layer ("layers.0") or module outside of layers ("embed_tokens"):

    gradient_norms, before clipping; weight_norms, before the step; update_ratios: norm of the step's change of the
    weights, learning rate and decay included, / their norm (about 0.001 in a healthy run; left out where all weights
    are 0). Keeps a copy of the weights during such a step. With tensor, expert or pipeline parallelism the figures are
    of the part that the main process holds. Raises GristmillError for `every` below 1.
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise GristmillError(f"every must be at least 1, got {every}")
        self.every = every
        self._before: dict[str, Tensor] = {}

    def gradients_ready(self, run: Run) -> None:
        """Norms of the gradients; keep the weights."""
        self._before = {}
        if (run.position.step + 1) % self.every:
            return
        parameters = dict(run.model.named_parameters())
        run.record["gradient_norms"] = norms({n: p.grad for n, p in parameters.items() if p.grad is not None})
        self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def after_step(self, run: Run) -> None:
        """Norms of the weights and of what the step changed."""
        if not self._before:
            return
        changes = {name: p.detach() - self._before[name] for name, p in run.model.named_parameters()}
        weights, updates = norms(self._before), norms(changes)
        self._before = {}
        run.record["weight_norms"] = weights
        run.record["update_ratios"] = {
            name: None if (update := updates[name]) is None or size is None else update / size
            for name, size in weights.items()
            if size != 0.0
        }


class SpeedMonitor(Callback):
    """Records mfu each step: the share of the device's peak that the model's own operations reach.

    flops_per_token: operations of a training step per token; None takes those of the model's configuration at the
    step's mean attended length. peak_flops: FLOP/s of one device; None measures a matrix product at the start.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """

    def __init__(self, *, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        for name, value in (("flops_per_token", flops_per_token), ("peak_flops", peak_flops)):
            if value is not None and not value > 0.0:
                raise GristmillError(f"{name} must be above 0, got {value}")
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops

    def start(self, run: Run) -> None:
        """Measure the peak. Raises GristmillError where the operations of the model are not known."""
        if self.flops_per_token is None and not isinstance(getattr(run.model, "config", None), ModelConfig):
            raise GristmillError(f"mfu of a {type(run.model).__name__}: give SpeedMonitor flops_per_token")
        if self.peak_flops is None:
            self.peak_flops = measured_peak_flops(run.world.device, _product_type(run.config.precision))

    def after_step(self, run: Run) -> None:
        """Raises GristmillError for batches that do not say how long their segments are."""
        operations = self.flops_per_token
        if operations is None:
            assert isinstance(run.model.config, ModelConfig)
            config = run.model.config
            operations = model_flops_per_token(config, mean_attended(run.batches, causal=config.causal))
        assert self.peak_flops is not None
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        run.record["mfu"] = run.record["tokens_per_second"] * operations / (self.peak_flops * processes)


class MemoryMonitor(Callback):
    """Records each step peak_memory_bytes, the most memory the process has taken so far, and on a GPU
    gpu_peak_memory_bytes, the most its tensors have."""

    def after_step(self, run: Run) -> None:
        """Ask the system and the allocator."""
        run.record["peak_memory_bytes"] = peak_memory()
        if run.world.device.type == "cuda":
            run.record["gpu_peak_memory_bytes"] = torch.cuda.max_memory_allocated(run.world.device)


@dataclass(frozen=True)
class Limit:
    """An alarm for every figure whose name fits `pattern` ("activations/*/max_abs") and whose value is `above` or
    `below` the limit, or not finite. `meaning` is told with it."""

    pattern: str
    above: float | None = None
    below: float | None = None
    meaning: str = ""

    def broken_by(self, value: float | None) -> str | None:
        """What is wrong with a value."""
        if value is None:
            return "not finite"
        if self.above is not None and value > self.above:
            return f"{value:.3g}, above {self.above:g}"
        if self.below is not None and value < self.below:
            return f"{value:.3g}, below {self.below:g}"
        return None


LIMITS = (
    Limit("activations/*/max_abs", above=1e4, meaning="activations grow; float16 overflows at 65,504"),
    Limit("activations/*/std", below=1e-6, meaning="the layer hands on the same for every token"),
    Limit("attention_entropy/*/share", below=0.01, meaning="attention has collapsed onto single tokens"),
    Limit(
        "dead_units/*", above=0.5, meaning="most units never fire; try a smaller learning rate or another activation"
    ),
    Limit("dead_experts/*", above=0.5, meaning="most experts get no token; balance the router"),
    Limit("gradient_norms/*", below=1e-10, meaning="no gradient arrives here"),
    Limit("update_ratios/*", above=0.1, meaning="the weights change by a large share in one step"),
)


class Alarms(Callback):
    """Adds `alarms`, a list of sentences, to the record of a step in which figures cross their limits.

    Each figure is told on stderr once. Comes after the monitors and before what shows their figures.
    """

    priority = -10

    def __init__(self, limits: Sequence[Limit] = LIMITS) -> None:
        self.limits = limits
        self._told: set[str] = set()

    def after_step(self, run: Run) -> None:
        """Compare every figure of the record."""
        found = []
        for name, value in flat(run.record):
            for limit in self.limits:
                wrong = limit.broken_by(value) if fnmatch.fnmatchcase(name, limit.pattern) else None
                if wrong is None:
                    continue
                sentence = f"{name} is {wrong}" + (f": {limit.meaning}" if limit.meaning else "")
                found.append(sentence)
                if name not in self._told and run.world.is_main:
                    print(f"warning: step {run.position.step}: {sentence}", file=sys.stderr)
                self._told.add(name)
        if found:
            run.record["alarms"] = found


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number of a record, or None in the place of one, with its name: "activations/layers.0/std"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield f"{prefix}{name}", value


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Norm of all weights of a layer, or of a module outside of layers, together; None where it is not finite."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        groups[match[1] if match else name.rpartition(".")[0] or name].append(tensor.detach().float())
    return {group: finite(_whole(nn.utils.get_total_norm(members))) for group, members in groups.items()}


def mean_attended(batches: Sequence[Any], *, causal: bool) -> float:
    """Keys that a token of the batches sees on average. Raises GristmillError for batches without segment_lengths."""
    tokens = pairs = 0
    for batch in batches:
        lengths = getattr(batch, "segment_lengths", None)
        if lengths is None:
            raise GristmillError(f"{type(batch).__name__} has no segment_lengths: give SpeedMonitor flops_per_token")
        tokens += sum(lengths)
        pairs += sum(length * (length + 1) // 2 if causal else length**2 for length in lengths)
    return pairs / max(tokens, 1)


def measured_peak_flops(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of several square matrix products within about so many seconds."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones((size, size), device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), None
    while end is None or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if end is None:  # the first one warms up
            end = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory() -> int:
    """Most bytes of memory that this process has taken so far."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _product_type(precision: str) -> torch.dtype:
    kinds = {"float32": torch.float32, "float16": torch.float16}
    return kinds.get(precision, torch.bfloat16)


def _whole(norm: Tensor) -> float:
    """A norm of sharded weights is a sharded tensor."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

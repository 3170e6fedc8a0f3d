"""What happens inside a model: size of the activations, spread of the attention, units that never fire.

Every so many steps the first batches of the step go through the model once more, without gradients and without
dropout, and are looked at on the way. So compilation and recomputation need not know of it, a run ends with the same
weights whether it is watched or not, and the other steps cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.model.attention.latent import LatentAttention
from gristmill.model.attention.layer import Attention
from gristmill.model.block import Block
from gristmill.model.feedforward import FeedForward
from gristmill.model.moe import Router, Routing
from gristmill.train.callbacks import Callback, Run
from gristmill.train.precision import Precision
from gristmill.train.watch.attention_entropy import EntropyTap

Figures = dict[str, Any]


class ActivationMonitor(Callback):
    """Records every `every` steps, by layer ("layers.0", "encoder.layers.0"):

    activations: mean, std and max_abs of what the block hands on. attention_entropy: `nats` and `share` (of the
    greatest possible), mean over heads and queries of the first `rows` sequences. dead_units: share of the units of a
    feed-forward layer whose output (of a gated one act(gate) * up) stayed within `dead_below` of 0 for all tokens of
    the batches. dead_experts: share of the experts of a mixture that got no token.

    batches: loader batches of the step that are looked at, at most; with several processes each looks at its own and
    the main one records. A figure that is not finite is recorded as null. Raises GristmillError for a count below 1.
    """

    def __init__(self, every: int = 100, *, batches: int = 1, rows: int = 2, dead_below: float = 1e-4) -> None:
        for name, value in (("every", every), ("batches", batches), ("rows", rows)):
            if value < 1:
                raise GristmillError(f"{name} must be at least 1, got {value}")
        self.every, self.batches, self.rows, self.dead_below = every, batches, rows, dead_below

    def before_step(self, run: Run) -> None:
        """Look at the batches, with the weights that the step begins with."""
        if (run.position.step + 1) % self.every:
            return
        precision = Precision(run.config.precision, run.world.device)

        def forward() -> None:
            for batch in run.batches[: self.batches]:
                run.world.evaluate(run.module, batch, precision)

        devices = [run.world.device] if run.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            run.module.eval()
            try:
                run.record |= observe(run.model, forward, rows=self.rows, dead_below=self.dead_below)
            finally:
                run.module.train()


@torch.no_grad()
def observe(model: nn.Module, forward: Callable[[], object], *, rows: int = 2, dead_below: float = 1e-4) -> Figures:
    """Call `forward`, which runs `model` (compiled or not), and return what `ActivationMonitor` records."""
    seen = _Seen(rows, dead_below)
    with ExitStack() as stack:
        for name, part in model.named_modules():
            for handle in seen.hooks(name, part):
                stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled already knows of no hooks
        forward()
    return seen.figures()


@dataclass
class _Moments:
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.count += x.numel()
        self.total += float(x.sum())
        self.squares += float(x.square().sum())
        self.largest = float(torch.maximum(x.abs().max(), x.new_tensor(self.largest)))  # NaN stays

    def figures(self) -> Figures:
        mean = self.total / self.count
        std = math.sqrt(max(self.squares / self.count - mean**2, 0.0)) if math.isfinite(self.squares) else math.nan
        return {"mean": finite(mean), "std": finite(std), "max_abs": finite(self.largest)}


class _Seen:
    """What the hooks of one observation have found so far, by layer."""

    def __init__(self, rows: int, dead_below: float) -> None:
        self.rows, self.dead_below = rows, dead_below
        self.moments: dict[str, _Moments] = {}
        self.entropies: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.fired: dict[str, Tensor] = {}
        self.tokens_of: dict[str, Tensor] = {}

    def hooks(self, name: str, part: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Hang what fits onto one module."""
        if isinstance(part, Block):
            return [part.register_forward_hook(lambda _, args, out: self._block(name, args[2], out))]
        if isinstance(part, Attention | LatentAttention):
            return [part.register_forward_pre_hook(lambda _, args: self._attention(name, *args))]
        if isinstance(part, FeedForward):
            return [part.down_proj.register_forward_pre_hook(lambda _, args: self._inner(name, args[0]))]
        if isinstance(part, Router):
            return [part.register_forward_hook(lambda _, args, out: self._routed(name, out))]
        return []

    def figures(self) -> Figures:
        """The record, without what the model has not."""
        spread = {
            name: {"nats": _mean([nats for nats, _ in found]), "share": _mean([share for _, share in found])}
            for name, found in self.entropies.items()
        }
        return {
            key: figures
            for key, figures in {
                "activations": {name: moments.figures() for name, moments in self.moments.items()},
                "attention_entropy": spread,
                "dead_units": {name: _share(~fired) for name, fired in self.fired.items()},
                "dead_experts": {name: _share(counts == 0) for name, counts in self.tokens_of.items()},
            }.items()
            if figures
        }

    def _block(self, name: str, layer: int, out: Tensor) -> None:
        self.moments.setdefault(_executed(name, layer), _Moments()).add(out)

    def _attention(self, name: str, x: Tensor, step: Any, layer: int) -> tuple[Tensor, Any, int]:
        found = self.entropies.setdefault(_executed(name.removesuffix(".self_attn"), layer), [])
        tap = EntropyTap(step.cache, self.rows, lambda nats, share: found.append((nats, share)))
        return x, replace(step, cache=tap), layer

    def _inner(self, name: str, inner: Tensor) -> None:
        fired = (inner.abs() > self.dead_below).flatten(0, -2).any(dim=0)
        name = name.removesuffix(".mlp")
        self.fired[name] = fired | self.fired[name] if name in self.fired else fired

    def _routed(self, name: str, routing: Routing) -> None:
        name = name.removesuffix(".mlp.router")
        self.tokens_of[name] = self.tokens_of.get(name, 0) + routing.counts()


def finite(value: float) -> float | None:
    """The value, or None where it is not finite: JSON has no such number."""
    return value if math.isfinite(value) else None


def _executed(block: str, layer: int) -> str:
    """Blocks with shared weights run as several layers: "layers.0" run as layer 3 is "layers.3"."""
    return f"{block.rpartition('.')[0]}.{layer}"


def _mean(parts: list[Tensor]) -> float | None:
    return finite(float(torch.cat([part.flatten() for part in parts]).nanmean()))


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())

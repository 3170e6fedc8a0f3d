"""What a training run shows to those who watch it, and where they may step in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gristmill.train.checkpoint import Position
from gristmill.train.config import TrainConfig
from gristmill.train.ema import WeightAverage
from gristmill.train.world import World


@dataclass
class Run:
    """A run at work. Callbacks may read all of it, add to `record`, and call `stop`."""

    model: nn.Module
    module: nn.Module
    """What runs: the model with its objective, compiled or replicated as the run asks."""
    optimiser: torch.optim.Optimizer
    config: TrainConfig
    directory: Path
    world: World
    position: Position
    average: WeightAverage | None = None
    """The moving average of the weights, if one is kept."""
    batches: Sequence[Any] = ()
    """The batches of the step at work, on this process."""
    record: dict[str, Any] = field(default_factory=dict)
    """What metrics.jsonl gets for the step at work."""
    stopped: str | None = None

    def stop(self, why: str) -> None:
        """End the run after this step, with a checkpoint."""
        self.stopped = self.stopped or why


class Callback:
    """Hooks that do nothing; derive and fill in what is needed. Those of higher `priority` are called first.

    Hooks run on every process of a run; only `run.world.is_main` should write.
    """

    priority = 0

    @property
    def name(self) -> str:
        """Under which the state is kept in checkpoints: one callback of a name per run."""
        return type(self).__name__

    def start(self, run: Run) -> None:
        """Before the first step of this attempt; the state is loaded already."""

    def before_step(self, run: Run) -> None:
        """`run.batches` are at hand."""

    def gradients_ready(self, run: Run) -> None:
        """All gradients of the step stand, not clipped yet."""

    def after_step(self, run: Run) -> None:
        """The weights are new, `run.position` counts the step, `run.record` is full but for what callbacks add."""

    def validated(self, run: Run) -> None:
        """`run.record` has the validation loss of this step."""

    def checkpointed(self, run: Run) -> None:
        """A checkpoint of `run.position` was taken."""

    def end(self, run: Run) -> None:
        """The run is over, whether complete or stopped by a callback; not after an error."""

    def state(self) -> dict[str, Any]:
        """What the next attempt needs, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

"""Exponential moving average of the weights: often better than the last weights, and free of the last batches' noise.

Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gristmill.errors import GristmillError
from gristmill.model.formats.state import check_shapes


class WeightAverage:
    """average = decay * average + (1 - decay) * weight after each step, in float32, from the weights of construction.

    About 1 / (1 - decay) steps count, so a run should be many times longer. Raises GristmillError for a decay outside
    [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise GristmillError(f"the decay of the weights' average must be in [0, 1), got {decay}")
        self.decay = decay
        self._averages = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights as they are. Call once after each step."""
        weights = [weight.float() for weight in model.parameters()]  # no copy when they are float32
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights with the averages, rounded to the weights' type."""
        for name, weight in model.named_parameters():
            weight.copy_(self._averages[name])

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages inside the block and its own weights, bit for bit, after it."""
        own = [weight.detach().clone() for weight in model.parameters()]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(model.parameters(), own, strict=True):
                    weight.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32, not copied."""
        return dict(self._averages)

    def load_tensors(self, tensors: Mapping[str, Tensor], where: str = "average of the weights") -> None:
        """Put back what `tensors` gave. Raises CheckpointError for a name or shape that does not fit."""
        check_shapes({name: average.shape for name, average in self._averages.items()}, tensors, where)
        for name, average in self._averages.items():
            average.copy_(tensors[name])

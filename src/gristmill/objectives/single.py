"""What objectives with one loss term share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.tokens.batch import PackedBatch

TERM = "loss"
"""Name of the one term."""


class SingleTerm(ABC):
    """An `Objective` whose loss is one sum over targets, divided by their number."""

    weights: Mapping[str, float] = {TERM: 1.0}

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> Any:
        """Lay segments (ids, mask) end to end as they are."""
        return PackedBatch.from_segments(examples)

    def counts(self, batch: Any) -> Mapping[str, int]:
        """See `Objective`."""
        return {TERM: batch.target_count}

    def loss_sums(self, model: torch.nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """See `Objective`."""
        return {TERM: self.loss_sum(model, batch)[0]}

    @abstractmethod
    def loss_sum(self, model: torch.nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Summed loss in nats over the targets of a batch, and their number."""


def example_generator(key: tuple[int, ...]) -> np.random.Generator:
    """The source of all that is random about one example."""
    return np.random.Generator(np.random.PCG64(key))

"""LoRA: matrices of a frozen model with a product of two thin ones added, different ones for different rows of a batch.

Source: Hu et al. 2022, section 4.1; Kalajdzievski 2023 for the scale alpha / sqrt(rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale * up @ down, which is added to the rows of a matrix from `begin` on: several foreign matrices are one here.

    name: of the foreign matrix, as Hugging Face writes it. down (rank, inputs) and up (rows, rank) are float32.
    """

    name: str
    begin: int
    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank of what is added, at most."""
        return len(self.down)

    @property
    def rows(self) -> slice:
        """The rows of our matrix that it is added to."""
        return slice(self.begin, self.begin + len(self.up))


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter: what is added to each matrix, by the name of our module. `config` is of the model it fits."""

    config: ModelConfig
    parts: Mapping[str, tuple[LowRank, ...]]

    @property
    def num_parameters(self) -> int:
        """Values of its matrices."""
        return sum(part.down.numel() + part.up.numel() for parts in self.parts.values() for part in parts)

    def to(self, device: torch.device) -> Lora:
        """The same on another device."""
        moved = {
            name: tuple(replace(part, down=part.down.to(device), up=part.up.to(device)) for part in parts)
            for name, parts in self.parts.items()
        }
        return Lora(self.config, moved)


@contextmanager
def applied(model: nn.Module, spans: Sequence[tuple[slice, Lora]]) -> Iterator[None]:
    """While it lasts, a forward of `model` over flat tokens adds to the tokens of each span what its adapter says.

    The layers may have weights of any kind: what is added is computed in float32 beside them.
    """
    handles = []
    try:
        for name in dict.fromkeys(name for _, lora in spans for name in lora.parts):
            added = [(span, lora.parts[name]) for span, lora in spans if name in lora.parts]
            handles.append(model.get_submodule(name).register_forward_hook(partial(_add, added)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    added: Sequence[tuple[slice, tuple[LowRank, ...]]], layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    for span, parts in added:
        x = inputs[0][span].float()
        for part in parts:
            output[span, part.rows] += ((x @ part.down.T) @ part.up.T * part.scale).to(output.dtype)
    return output


@torch.no_grad()
def merge(model: nn.Module, lora: Lora) -> None:
    """Add an adapter to a model's own weights, in place. Raises CheckpointError where these are not plain matrices."""
    for name in lora.parts:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(
                f"{name} is a {type(layer).__name__}, and nothing can be added to its weights: merge before quantising"
            )
    for name, parts in lora.parts.items():
        weight = model.get_parameter(f"{name}.weight")
        for part in parts:
            weight[part.rows] += (part.up @ part.down * part.scale).to(weight.dtype)

"""A tiny model whose matrices groups of 32 divide, and text for it: walks on a ring, which bring some inputs often."""

from __future__ import annotations

from typing import Any

import torch

from gristmill.model.transformer import Transformer
from model import tiny


def model(seed: int = 0, **changes: Any) -> Transformer:
    """A decoder of width 64, its weights heavy-tailed: rounding to four bits shows."""
    built = tiny.model(seed, **{"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2, **changes})
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter[torch.randint(len(parameter), (4,), generator=generator)] *= 8
    return built


def text(sequences: int = 6, length: int = 64, seed: int = 0) -> list[list[int]]:
    """Token ids of some sequences."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-3, 4, (sequences, length), generator=generator)
    return (steps.cumsum(1) % 60).tolist()

"""How a training run is made: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gristmill.errors import GristmillError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the training loop. Raises GristmillError naming a value out of range."""

    steps: int
    """Optimiser steps of the whole run."""
    micro_batches: int = 1
    """Loader batches whose gradients make one step; the loss is normalised over all of them together."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    final_learning_rate: float = 0.0
    """Share of the peak that the learning rate falls to, linearly, at the last step."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms) are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    clip_norm: float = 1.0
    """Gradients of a greater global norm are scaled down to this."""
    precision: Precision = "float32"
    """bfloat16 runs matrix products under autocast; weights and optimiser stay float32."""
    validate_every: int = 100
    """Steps between measurements of the held-out loss; the last step always measures it."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise GristmillError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GristmillError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise GristmillError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.weight_decay >= 0.0:
            raise GristmillError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.precision not in get_args(Precision):
            raise GristmillError(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0.0:
                raise GristmillError(f"{name} must be above 0, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then linear decay.

        Source: Bergsma et al. 2025 (linear decay to zero).
        """
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        done = (step - rise + 1) / max(1, self.steps - rise)
        return self.learning_rate * (1.0 - done * (1.0 - self.final_learning_rate))

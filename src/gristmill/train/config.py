"""How a training run is made: one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from gristmill.errors import GristmillError, closest
from gristmill.train.optimisers import OptimiserName
from gristmill.train.precision import PrecisionName
from gristmill.train.schedules import BatchGrowth, DecayShape, Schedule, check_schedule, learning_rate

BadStep = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of the training loop. Raises GristmillError naming a value out of range.

    The length of a run is given in tokens or in steps; all shares below are shares of it.
    """

    tokens: int | None = None
    """Tokens to train on; the step that reaches them is the last."""
    steps: int | None = None
    """Optimiser steps of the whole run, where `tokens` is not given."""
    micro_batches: int = 1
    """Loader batches whose gradients make one step; the loss is normalised over all of them together."""
    batch_growth: tuple[tuple[int, int], ...] = ()
    """(tokens, micro_batches), ascending: from so many trained tokens on, steps have so many loader batches."""
    optimiser: OptimiserName = "adamw"
    """adamw; muon (matrices of the blocks, AdamW for the rest); lion; adafactor; sgd."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = "linear"
    """constant, linear, cosine, wsd (warm-up, stable, decay) or inverse_sqrt."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Share of the run, at its end, in which a wsd schedule falls."""
    decay_shape: DecayShape = "1-sqrt"
    """How a wsd schedule falls: linear or 1-sqrt."""
    final_learning_rate: float = 0.0
    """Share of the peak that the learning rate falls to at the end."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors (norms, biases) are not decayed."""
    betas: tuple[float, float] | None = None
    """Decay of the means of gradients and of their squares, for adamw, muon's AdamW and lion; None: what is usual
    (0.9 and 0.95, lion 0.99)."""
    momentum: float | None = None
    """For sgd (None: 0) and muon (None: 0.95)."""
    clip_norm: float = 1.0
    """Gradients of a greater global norm are scaled down to this."""
    precision: PrecisionName = "float32"
    """bfloat16 and float16 run matrix products under autocast; weights and optimiser stay float32. float16 scales the
    loss."""
    average: float | None = None
    """Decay of a moving average of the weights, such as 0.999; it is what validation measures. None keeps none."""
    dropout: float = 0.0
    """Share of each sub-layer's output that is left out at random."""
    checkpoint_activations: bool = False
    """Keep only the input of each block and compute it again in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    seed: int = 0
    """Of dropout; each step starts its own stream."""
    on_bad_step: BadStep = "stop"
    """What to do when loss or gradient are not finite or spike: stop; skip the step's update; or rewind to the newest
    checkpoint and go on with the data after the bad batch."""
    spike: float | None = None
    """A loss so many robust deviations above the recent median is a spike; None looks for none."""
    most_bad_steps: int = 10
    """After so many skipped or rewound steps the run stops."""
    validate_every: int = 100
    """Steps between measurements of the held-out loss; the last step always measures it."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay for good."""
    background_checkpoints: bool = True
    """Write checkpoints in a thread while training goes on; costs the memory of a copy."""

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.steps is None):
            raise GristmillError(f"give tokens or steps, one of them; got tokens {self.tokens} and steps {self.steps}")
        for name in ("tokens", "steps", "keep_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise GristmillError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batches", "validate_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise GristmillError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise GristmillError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("warmup", "decay", "final_learning_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GristmillError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.average is not None and not 0.0 <= self.average < 1.0:
            raise GristmillError(f"average must be in [0, 1), got {self.average}")
        if not self.weight_decay >= 0.0:
            raise GristmillError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        for name, kinds in (
            ("precision", PrecisionName),
            ("optimiser", OptimiserName),
            ("on_bad_step", BadStep),
        ):
            _one_of(name, getattr(self, name), get_args(kinds))
        for name in ("learning_rate", "clip_norm", "spike"):
            if getattr(self, name) is not None and not getattr(self, name) > 0.0:
                raise GristmillError(f"{name} must be above 0, got {getattr(self, name)}")
        check_schedule(self.schedule, warmup=self.warmup, decay=self.decay, decay_shape=self.decay_shape)
        self.growth  # noqa: B018 (complains now)

    @property
    def growth(self) -> BatchGrowth:
        """Loader batches a step as a function of the tokens trained."""
        return BatchGrowth(((0, self.micro_batches), *self.batch_growth))

    def learning_rate_at(self, step: int, tokens: int) -> float:
        """Learning rate of the step that ends with so many steps and tokens done, itself included."""
        done, warmup = tokens / (self.tokens or 1), self.warmup
        if self.steps is not None:  # the first step counts as the end of the rise, not as above it
            done, warmup = step / self.steps, max(1, round(warmup * self.steps)) / self.steps
        return learning_rate(
            min(done, 1.0),
            self.schedule,
            peak=self.learning_rate,
            warmup=warmup,
            final=self.final_learning_rate,
            decay=self.decay,
            decay_shape=self.decay_shape,
        )

    def is_over(self, step: int, tokens: int) -> bool:
        """Whether so many steps and tokens complete the run."""
        return step >= self.steps if self.steps is not None else tokens >= (self.tokens or 0)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise GristmillError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}.{closest(str(value), allowed)}"
        )

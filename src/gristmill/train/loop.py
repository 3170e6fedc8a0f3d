"""The training loop: pretraining and fine-tuning alike, exact to resume.

A step is a pure function of the weights, the optimiser state and the step number: the loader gives the batch of any
step at once, and nothing else is random. So a run that is killed and started again ends with the same weights, bit by
bit on a CPU with the same number of threads (another number adds in another order).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from gristmill.core import Objective
from gristmill.errors import CheckpointError, GristmillError
from gristmill.files import remove_leftovers
from gristmill.model.transformer import Transformer
from gristmill.progress import progress
from gristmill.tokens.batch import PackedBatch
from gristmill.train.checkpoint import Position, resume, save_checkpoint
from gristmill.train.config import TrainConfig
from gristmill.train.metrics import MetricsLog


class Loader(Protocol):
    """Batches by number."""

    def batch(self, step: int) -> PackedBatch:
        """The batch of a step, the same at every call."""

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every token comes once."""


def train(
    model: Transformer,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    directory: Path,
    *,
    validation: Loader | None = None,
    identity: str = "",
    description: str = "training",
) -> Position:
    """Train `model` in place to `config.steps`, going on from the newest checkpoint in `directory`.

    Leaves `metrics.jsonl` and `checkpoints/` there. `identity` names the run's settings: a checkpoint with another
    identity is refused. Ctrl-C or SIGTERM ends the step, writes a checkpoint and raises KeyboardInterrupt.
    The position's seconds are those of all attempts, validation and earlier checkpoints included.
    Raises GristmillError when the loss is no longer finite; the checkpoints before stay.
    """
    folder = directory / "checkpoints"
    for place in (directory, folder):
        remove_leftovers(place)
    optimiser = make_optimiser(model, config)
    position = resume(folder, model, optimiser, identity=identity) or Position(0, 0, 0.0, identity)
    if position.step > config.steps:
        raise CheckpointError(f"{folder}: its checkpoint is of step {position.step}, beyond {config.steps} steps")
    saved, began = position.step, time.perf_counter() - position.seconds
    model.train()
    with (
        closing(MetricsLog(directory / "metrics.jsonl", resume_step=position.step)) as log,
        progress(description, config.steps, done=position.step) as advance,
        _stop_signal() as stopped,
    ):
        while position.step < config.steps and not stopped.is_set():
            step = position.step + 1
            last = step == config.steps
            record, tokens = _step(model, objective, loader, optimiser, config, step)
            if validation is not None and (last or step % config.validate_every == 0):
                record["validation_loss"] = mean_loss(model, objective, validation, config)
                _require_finite(step, validation_loss=record["validation_loss"])
            position = Position(step, position.tokens + tokens, time.perf_counter() - began, identity)
            log.write({"step": step, **record, "tokens": position.tokens, "seconds": position.seconds})
            advance(step, f"loss {record['loss']:.3f}  {record['tokens_per_second']:.0f} tok/s")
            if last or step % config.checkpoint_every == 0:
                save_checkpoint(folder, model, optimiser, position, keep=config.keep_checkpoints)
                saved = step
        if stopped.is_set():
            if saved < position.step:
                save_checkpoint(folder, model, optimiser, position, keep=config.keep_checkpoints)
            raise KeyboardInterrupt
    model.eval()
    return position


def make_optimiser(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not. Source: Loshchilov and Hutter 2019."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def accumulate_gradients(
    model: Transformer, objective: Objective, batches: list[PackedBatch], config: TrainConfig
) -> float:
    """Add the gradient of the mean loss over all targets of all batches to the parameters; returns that loss.

    The one normaliser: every batch's summed loss is divided by the count over all of them, so how tokens are dealt
    into batches does not matter.
    """
    count = sum(batch.target_count for batch in batches)
    if count == 0:
        raise GristmillError("a training step has no token to learn: every target is masked")
    mean = 0.0
    for batch in batches:
        with _precision(model, config):
            total, _ = objective.loss_sum(model, batch)
        (total / count).backward()
        mean += float(total.detach()) / count
    return mean


@torch.no_grad()
def mean_loss(model: Transformer, objective: Objective, loader: Loader, config: TrainConfig) -> float:
    """Mean loss in nats per target over one epoch of a loader."""
    total, count = 0.0, 0
    device = model.embed_tokens.weight.device
    model.eval()
    for number in range(loader.batches_per_epoch):
        with _precision(model, config):
            part, targets = objective.loss_sum(model, loader.batch(number).to(device))
        total += float(part)
        count += targets
    model.train()
    if count == 0:
        raise GristmillError("the held-out data have no token to predict: every target is masked")
    return total / count


def _step(
    model: Transformer,
    objective: Objective,
    loader: Loader,
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> tuple[dict[str, Any], int]:
    """Step number `step`, counted from 1: what to record of it, and its tokens."""
    started = time.perf_counter()
    first = (step - 1) * config.micro_batches
    device = model.embed_tokens.weight.device
    batches = [loader.batch(first + number).to(device) for number in range(config.micro_batches)]
    rate = config.learning_rate_at(step - 1)
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = accumulate_gradients(model, objective, batches, config)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
    _require_finite(step, loss=loss, gradient_norm=norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    tokens = sum(len(batch.input_ids) for batch in batches)
    speed = tokens / (time.perf_counter() - started)
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens_per_second": speed}, tokens


def _require_finite(step: int, **figures: float) -> None:
    if not all(map(math.isfinite, figures.values())):
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        raise GristmillError(
            f"step {step}: {found}. The last checkpoint is whole; try a smaller learning rate or precision float32."
        )


def _precision(model: Transformer, config: TrainConfig) -> torch.autocast:
    device = model.embed_tokens.weight.device.type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16")


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two. A second signal ends at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

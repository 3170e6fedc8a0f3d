"""The training loop: pretraining and fine-tuning alike, exact to resume.

A step is a pure function of the weights, the optimiser state and the step number: the loader gives the batch of any
step at once, and nothing else is random. So a run that is killed and started again ends with the same weights.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from gristmill.core import Objective
from gristmill.errors import GristmillError
from gristmill.model.transformer import Transformer
from gristmill.progress import progress
from gristmill.tokens.batch import PackedBatch
from gristmill.train.checkpoint import Position, checkpoints, load_checkpoint, save_checkpoint
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
    Raises GristmillError when the loss is no longer finite; the checkpoints before stay.
    """
    optimiser = make_optimiser(model, config)
    saved = checkpoints(directory / "checkpoints")
    position = Position(0, 0, 0.0, identity)
    if saved:
        position = load_checkpoint(saved[-1], model, optimiser, identity=identity)
    log = MetricsLog(directory / "metrics.jsonl", resume_step=position.step)

    def save() -> None:
        save_checkpoint(directory / "checkpoints", model, optimiser, position, keep=config.keep_checkpoints)

    model.train()
    with progress(description, config.steps, done=position.step) as advance, _stop_signal() as stopped:
        while position.step < config.steps:
            started = time.perf_counter()
            record, tokens = _step(model, objective, loader, optimiser, config, position.step)
            step = position.step + 1
            last = step == config.steps
            seconds = time.perf_counter() - started
            position = Position(step, position.tokens + tokens, position.seconds + seconds, identity)
            record |= {"tokens": position.tokens, "seconds": position.seconds, "tokens_per_second": tokens / seconds}
            if validation is not None and (last or step % config.validate_every == 0):
                record["validation_loss"] = mean_loss(model, objective, validation, config)
            log.write({"step": step, **record})
            if last or step % config.checkpoint_every == 0 or stopped.is_set():
                save()
            advance(step, f"loss {record['loss']:.3f}  {record['tokens_per_second']:.0f} tok/s")
            if stopped.is_set() and not last:
                raise KeyboardInterrupt
    log.close()
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
    model.eval()
    for number in range(loader.batches_per_epoch):
        with _precision(model, config):
            part, targets = objective.loss_sum(model, loader.batch(number))
        total += float(part)
        count += targets
    model.train()
    return total / count


def _step(
    model: Transformer,
    objective: Objective,
    loader: Loader,
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    step: int,
) -> tuple[dict[str, Any], int]:
    first = step * config.micro_batches
    device = model.embed_tokens.weight.device
    batches = [loader.batch(first + number).to(device) for number in range(config.micro_batches)]
    rate = config.learning_rate_at(step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = accumulate_gradients(model, objective, batches, config)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise GristmillError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}. The last checkpoint is whole; "
            "try a smaller learning rate or precision float32."
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm}, sum(len(b.input_ids) for b in batches)


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

"""The training loop: pretraining and fine-tuning alike, exact to resume.

A step is a pure function of the weights, the optimiser state and the position: the loader gives any batch at once,
and what is random follows from seed and step. So a run that is killed and started again ends with the same weights,
bit by bit on a CPU with the same number of threads (another number adds in another order).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.core import Batch, Loader, Objective
from gristmill.errors import CheckpointError, GristmillError
from gristmill.files import remove_leftovers
from gristmill.progress import progress
from gristmill.train.callbacks import Callback, Run
from gristmill.train.checkpoint import Keeper, Position, checkpoints, resume, save_checkpoint
from gristmill.train.config import TrainConfig
from gristmill.train.ema import WeightAverage
from gristmill.train.guards import SpikeDetector, dump_batch, is_out_of_memory, memory_advice
from gristmill.train.metrics import MetricsLog
from gristmill.train.optimisers import make_optimiser, optimiser_tensors
from gristmill.train.precision import Precision, PrecisionName
from gristmill.train.prepare import check_model, device_of, prepare_model
from gristmill.train.signals import stop_signal
from gristmill.train.world import LossModule, World, model_tensors


def train(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    directory: Path,
    *,
    validation: Loader | None = None,
    identity: str = "",
    description: str = "training",
    callbacks: Sequence[Callback] = (),
    world: World | None = None,
    show_progress: bool = True,
) -> Position:
    """Train `model` in place to the end of the run, going on from the newest checkpoint in `directory`.

    Leaves `metrics.jsonl` and `checkpoints/` there. `identity` names the run's settings: a checkpoint with another
    identity is refused. Ctrl-C or SIGTERM ends the step, writes a checkpoint and raises KeyboardInterrupt.
    The position's seconds are those of all attempts, validation and earlier checkpoints included. With an average of
    the weights kept, the model has the averaged weights in the end.
    Raises GristmillError when the loss is no longer finite (see TrainConfig.on_bad_step), when memory runs out, with
    advice, and when a checkpoint cannot be written; the checkpoints before stay.
    """
    world = world or World(device_of(model))
    folder = directory / "checkpoints"
    if world.is_main:
        for place in (directory, folder, directory / "best", directory / "bad_batches"):
            remove_leftovers(place)
    trainer = _Trainer(model, objective, loader, validation, config, directory, world, callbacks)
    position = trainer.resume(identity)
    if position.step and config.steps is not None and position.step > config.steps:
        raise CheckpointError(f"{folder}: its checkpoint is of step {position.step}, beyond {config.steps} steps")
    model.train()
    log = MetricsLog(directory / "metrics.jsonl", resume_step=position.step) if world.is_main else None
    total, done = (config.steps, position.step) if config.steps is not None else (config.tokens or 0, position.tokens)
    shown = world.is_main and show_progress
    bar = progress(description, total, done=done) if shown else nullcontext(lambda *_: None)
    try:
        with closing(log) if log else nullcontext(), bar as advance, stop_signal() as stopped:
            trainer.loop(log, advance, stopped)
    finally:
        trainer.keeper.wait()
    if trainer.run.average is not None:
        trainer.run.average.copy_to(model)
    model.eval()
    return trainer.run.position


class _Trainer:
    """One attempt at a run: its parts, and how they make a step."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        validation: Loader | None,
        config: TrainConfig,
        directory: Path,
        world: World,
        callbacks: Sequence[Callback],
    ) -> None:
        self.objective, self.loader, self.validation, self.config = objective, loader, validation, config
        self.world, self.folder = world, directory / "checkpoints"
        self.callbacks = sorted(callbacks, key=lambda callback: -callback.priority)
        if len({callback.name for callback in callbacks}) < len(callbacks):
            raise GristmillError(f"two callbacks have one name: {', '.join(sorted(c.name for c in callbacks))}")
        world.check(config)
        check_model(model, loader, validation)
        self.precision = Precision(config.precision, world.device)
        self.precision.prepare(model)
        prepare_model(model, config)
        self.module = world.wrap(LossModule(model, objective))
        optimiser = make_optimiser(
            model,
            config.optimiser,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
            momentum=config.momentum,
        )
        average = None if config.average is None else WeightAverage(model, config.average)
        self.run = Run(model, self.module, optimiser, config, directory, world, Position(0, 0, 0.0, ""), average)
        self.spikes = SpikeDetector(threshold=config.spike)
        self.keeper = Keeper(save_checkpoint, background=config.background_checkpoints and world.background)
        self.saved = 0

    def resume(self, identity: str) -> Position:
        """Load the newest whole checkpoint, if there is one."""
        run = self.run
        extra = {} if run.average is None else {"average": run.average.load_tensors}
        if self.precision.tensors():
            extra["scaler"] = self.precision.load_tensors
        found = resume(self.folder, run.model, run.optimiser, identity=identity, extra=extra, world=self.world)
        run.position = found or Position(0, 0, 0.0, identity)
        if found is not None:
            self.spikes.load_state(found.facts.get("spikes", {"losses": []}))
            states = found.facts.get("callbacks", {})
            for callback in self.callbacks:
                if callback.name in states:
                    callback.load_state(states[callback.name])
        self.saved = run.position.step
        return run.position

    def loop(self, log: MetricsLog | None, advance: Any, stopped: threading.Event) -> None:
        """Steps until the run is over, a callback stops it or a signal comes."""
        run, config = self.run, self.config
        began = time.perf_counter() - run.position.seconds
        self._call("start")
        while not (self.is_over or run.stopped or self.world.any(stopped.is_set())):
            run.record = {}
            self.keeper.check()
            rewound = self.step()
            if rewound:
                if log is not None:
                    log.rewind(run.position.step)
                continue
            step = run.position.step
            last = self.is_last
            if self.validation is not None and (last or step % config.validate_every == 0):
                self.validate()
            run.position = dataclasses.replace(run.position, seconds=time.perf_counter() - began)
            self._call("after_step")
            if self.validation is not None and self.is_last and not last and step % config.validate_every:
                self.validate()
            if log is not None:
                log.write({"step": step, **run.record, "tokens": run.position.tokens, "seconds": run.position.seconds})
            told = f"loss {run.record['loss']:.3f}" if "loss" in run.record else "skipped"
            advance(
                step if config.steps is not None else run.position.tokens,
                f"{told}  {run.record['tokens_per_second']:.0f} tok/s",
            )
            if self.is_last or step % config.checkpoint_every == 0:
                self.save()
        if self.saved < run.position.step:
            self.save()
        self.keeper.wait()
        if self.world.any(stopped.is_set()):
            raise KeyboardInterrupt
        self._call("end")

    @property
    def is_over(self) -> bool:
        """Whether the run is complete."""
        return self.config.is_over(self.run.position.step, self.run.position.tokens)

    @property
    def is_last(self) -> bool:
        """Whether there is no step after this one."""
        return self.is_over or self.run.stopped is not None

    def step(self) -> bool:
        """One step; True when it was bad and the run went back to a checkpoint instead."""
        run, config, world = self.run, self.config, self.world
        started = time.perf_counter()
        torch.manual_seed(config.seed * 1_000_003 + run.position.step * world.data_size + world.data_rank)
        first, number = run.position.batches, config.growth.at(run.position.tokens)
        run.batches = [self.loader.batch(index).to(world.device) for index in world.share(first, number)]
        self._call("before_step")
        counts, tokens = count_targets(self.objective, run.batches, world)
        rate = config.learning_rate_at(run.position.step + 1, run.position.tokens + tokens)
        for group in run.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        with self._memory_advised():
            losses = accumulate_gradients(self.module, self.objective, run.batches, counts, world, self.precision)
        self.precision.unscale(run.optimiser)
        self._call("gradients_ready")
        norm = world.clip(run.model, config.clip_norm)
        reached = dataclasses.replace(
            run.position, step=run.position.step + 1, tokens=run.position.tokens + tokens, batches=first + number
        )
        run.record |= losses | {"learning_rate": rate, "gradient_norm": norm}
        wrong = None if self.precision.expects(losses["loss"], norm) else self.spikes.check(losses["loss"], norm)
        if wrong is not None:
            if self._bad_step(wrong, reached):
                return True
        else:
            with self._memory_advised():
                self._update(losses["loss"], norm)
            run.position = reached
        run.optimiser.zero_grad(set_to_none=True)
        run.record["tokens_per_second"] = tokens / (time.perf_counter() - started)
        return False

    def _update(self, loss: float, norm: float) -> None:
        if not self.precision.step(self.run.optimiser):
            self.run.record["skipped"] = "the scaled gradients overflowed"
            self.run.record.pop("gradient_norm")
            return
        self.spikes.accept(loss, norm)
        if self.run.average is not None:
            self.run.average.update(self.run.model)

    def _bad_step(self, why: str, reached: Position) -> bool:
        """Keep the batches of a bad step and skip it, or go back (True), or end the run, as the configuration says."""
        run, config = self.run, self.config
        kept = dump_batch(run.directory, reached.step, run.batches, why, rank=self.world.data_rank)
        bad = run.position.bad_steps + 1
        told = f"step {reached.step}: {why}; its batches are in {kept}"
        if config.on_bad_step == "stop":
            raise GristmillError(
                f"{told}. The last checkpoint is whole; try a smaller learning rate, precision float32, or on_bad_step "
                "skip or rewind."
            )
        if bad > config.most_bad_steps:
            raise GristmillError(f"{told}. It was bad step {bad}, and most_bad_steps is {config.most_bad_steps}.")
        if self.world.is_main:
            print(f"warning: {told}; {config.on_bad_step}", file=sys.stderr)
        run.optimiser.zero_grad(set_to_none=True)
        if config.on_bad_step == "skip":
            run.position = dataclasses.replace(reached, bad_steps=bad)
            run.record = {name: value for name, value in run.record.items() if _finite(value)} | {"skipped": why}
            return False
        self.keeper.wait()
        if not checkpoints(self.folder):
            raise GristmillError(f"{told}. There is no checkpoint to rewind to yet; use on_bad_step skip.")
        self.resume(run.position.identity)
        # the data go on behind the bad batch: coming by the same way would meet it again
        run.position = dataclasses.replace(run.position, batches=reached.batches, bad_steps=bad)
        return True

    def validate(self) -> None:
        """Measure the held-out loss, of the averaged weights where there are such."""
        run = self.run
        assert self.validation is not None
        with nullcontext() if run.average is None else run.average.swapped_in(run.model):
            found = mean_losses(self.module, self.objective, self.validation, self.world, self.precision)
        for name, value in found.items():
            if not _finite(value):
                raise GristmillError(
                    f"step {run.position.step}: validation {name} {value}. The last checkpoint is whole; try a smaller "
                    "learning rate or precision float32."
                )
        run.record |= {f"validation_{name}": value for name, value in found.items()}
        self._call("validated")

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        run, config = self.run, self.config
        states = {callback.name: state for callback in self.callbacks if (state := callback.state())}
        run.position = dataclasses.replace(
            run.position, facts={"spikes": self.spikes.state(), **({"callbacks": states} if states else {})}
        )
        groups: dict[str, dict[str, Tensor]] = {
            "model": model_tensors(run.model),
            "optimiser": optimiser_tensors(run.model, run.optimiser),
        }
        if run.average is not None:
            groups["average"] = run.average.tensors()
        if scaler := self.precision.tensors():
            groups["scaler"] = scaler
        self.keeper.save(
            self.folder,
            groups,
            run.position,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            world=self.world,
        )
        self.saved = run.position.step
        self._call("checkpointed")

    @contextmanager
    def _memory_advised(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            told = memory_advice(error, self.config, self.run.model, self.run.batches[0].tokens)
            raise GristmillError(told) from error

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self.run)


def count_targets(objective: Objective, batches: Sequence[Batch], world: World) -> tuple[dict[str, int], int]:
    """Targets of each term, and tokens, of the batches of all processes."""
    names = list(objective.weights)
    own = [objective.counts(batch) for batch in batches]
    *counts, tokens = world.sum([*(sum(c[name] for c in own) for name in names), sum(b.tokens for b in batches)])
    return {name: round(count) for name, count in zip(names, counts, strict=True)}, round(tokens)


def accumulate_gradients(
    module: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    counts: dict[str, int],
    world: World,
    precision: Precision,
) -> dict[str, float]:
    """Add the gradient of the loss of all batches of all processes to the parameters; return the loss, and its terms
    if there are several.

    The one normaliser: the summed loss of each term is divided by its count over everything, so how tokens are dealt
    into batches and processes does not matter. A term without a target counts nothing.
    """
    if not any(counts.values()):
        raise GristmillError("a training step has no token to learn: every target is masked")
    scales = {name: weight / counts[name] for name, weight in objective.weights.items() if counts[name]}
    sums = world.backward(module, batches, scales, precision)
    return _means(objective, dict(zip(sums, world.sum(list(sums.values())), strict=True)), counts)


def loss_and_gradients(
    model: nn.Module, objective: Objective, batches: Sequence[Any], precision: PrecisionName = "float32"
) -> dict[str, float]:
    """What one step of one process does before the update: gradients of the mean loss over all batches, and the loss.

    For those who want no loop around it.
    """
    world = World(device_of(model))
    counts, _ = count_targets(objective, batches, world)
    module = LossModule(model, objective)
    return accumulate_gradients(module, objective, batches, counts, world, Precision(precision, world.device))


@torch.no_grad()
def mean_losses(
    module: nn.Module, objective: Objective, loader: Loader, world: World, precision: Precision
) -> dict[str, float]:
    """Mean loss in nats over one epoch of a loader, and its terms if there are several."""
    sums = dict.fromkeys(objective.weights, 0.0)
    counts = dict.fromkeys(objective.weights, 0)
    module.eval()
    for number in world.share(0, loader.batches_per_epoch):
        batch = loader.batch(number).to(world.device)
        for name, value in world.evaluate(module, batch, precision).items():
            sums[name] += value
            counts[name] += objective.counts(batch)[name]
    module.train()
    names = list(sums)
    everything = world.sum([*sums.values(), *counts.values()])
    sums = dict(zip(names, everything[: len(names)], strict=True))
    counts = {name: round(count) for name, count in zip(names, everything[len(names) :], strict=True)}
    if not any(counts.values()):
        raise GristmillError("the held-out data have no token to predict: every target is masked")
    return _means(objective, sums, counts)


def _means(objective: Objective, sums: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    means = {name: sums[name] / counts[name] for name in objective.weights if counts[name]}
    loss = sum(objective.weights[name] * mean for name, mean in means.items())
    return {"loss": loss} if len(objective.weights) == 1 else {"loss": loss, **means}


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or (value == value and abs(value) != float("inf"))

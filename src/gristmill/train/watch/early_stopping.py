"""Stop when the held-out loss no longer falls, and give back the weights that had the lowest.

Source: Prechelt 1998; for multilingual models, whose loss turns up from some point on: Conneau et al. 2020.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gristmill.errors import CheckpointError, GristmillError, closest
from gristmill.files import write_json
from gristmill.model.formats.state import check_shapes
from gristmill.train.callbacks import Callback, Run
from gristmill.train.watch.monitors import flat
from gristmill.train.world import model_tensors


class EarlyStopping(Callback):
    """Ends the run after `patience` validations in a row without a new best, and restores the best weights.

    What is compared is the mean of `metrics`, figures of the record ("validation_loss", or one per language; what
    other callbacks of higher priority add in `validated` counts too); a new best is lower by more than `min_delta`, or
    higher where `higher_is_better`. The best weights (the averaged ones, where the run keeps an average) are in
    `directory/best/step-N/`, atomic, and in the model when the run is over. A resumed run decides the same; one that
    was stopped stays stopped.

    Raises GristmillError for a patience below 1, no metrics, and in a run whose record lacks a metric.
    """

    def __init__(
        self,
        patience: int,
        metrics: Sequence[str] = ("validation_loss",),
        *,
        min_delta: float = 0.0,
        higher_is_better: bool = False,
    ) -> None:
        if patience < 1:
            raise GristmillError(f"patience must be at least 1 validation, got {patience}")
        if not metrics:
            raise GristmillError("metrics must name at least one figure of the record, such as validation_loss")
        if not min_delta >= 0.0:
            raise GristmillError(f"min_delta must be 0 or more, got {min_delta}")
        self.patience, self.metrics = patience, tuple(metrics)
        self.min_delta, self.sign = min_delta, -1.0 if higher_is_better else 1.0
        self.best: float | None = None
        self.best_step = self.waited = 0

    def start(self, run: Run) -> None:
        """Go no further where an earlier attempt was stopped."""
        self._stop_if_due(run)

    def validated(self, run: Run) -> None:
        """Keep the weights or count the failure."""
        value = self._value(run.record)
        if self.best is None or self.sign * (self.best - value) > self.min_delta:
            self.best, self.best_step, self.waited = value, run.position.step, 0
            self._save(run)
        else:
            self.waited += 1
        run.record["best"] = {"value": self.best, "step": self.best_step}
        self._stop_if_due(run)

    def checkpointed(self, run: Run) -> None:
        """Delete bests that no checkpoint to come goes back to; those of the newest checkpoints stay."""
        oldest = run.position.step - run.config.keep_checkpoints * run.config.checkpoint_every
        for path in (run.directory / "best").glob("step-????????"):
            step = int(path.name[5:])
            if run.world.is_main and step < min(self.best_step, oldest):
                shutil.rmtree(path)

    def end(self, run: Run) -> None:
        """Put the best weights into the model. Raises CheckpointError when they are not on disk."""
        if self.best is None:
            return
        path = self._path(run)
        own = model_tensors(run.model)
        try:
            found = run.world.read(path, "model", own)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. The last checkpoint has the weights of the last step.") from error
        check_shapes({name: tensor.shape for name, tensor in own.items()}, found, str(path))
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        if run.average is not None:  # it becomes the model's weights after this
            run.average.load_tensors({name: found[name] for name in run.average.tensors()}, str(path))

    def state(self) -> dict[str, Any]:
        """Best value, its step, and validations since."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for a state of another kind."""
        try:
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
        except KeyError as error:
            raise CheckpointError(f"early stopping: its state lacks {error}") from error

    def _value(self, record: dict[str, Any]) -> float:
        figures = dict(flat(record))
        values = []
        for name in self.metrics:
            value = figures.get(name)
            if value is None:
                near = closest(name, figures) or f" It has: {', '.join(sorted(figures))}."
                raise GristmillError(f"early stopping: the record has no figure {name!r} when it is validated.{near}")
            values.append(value)
        return math.fsum(values) / len(values)

    def _stop_if_due(self, run: Run) -> None:
        if self.waited >= self.patience:
            run.stop(f"no better {' and '.join(self.metrics)} since step {self.best_step}")

    def _save(self, run: Run) -> None:
        averages = {} if run.average is None else run.average.tensors()
        with run.world.directory(self._path(run)) as temporary:
            run.world.write(temporary, "model", model_tensors(run.model) | averages)
            if run.world.is_main:
                write_json(temporary / "best.json", {"step": self.best_step, "value": self.best})

    def _path(self, run: Run) -> Path:
        return run.directory / "best" / f"step-{self.best_step:08d}"

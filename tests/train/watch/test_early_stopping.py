"""A run stops at the best validation and gives its weights back, also when it is interrupted on the way."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gristmill.errors import CheckpointError, GristmillError
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.train.callbacks import Callback, Run
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.early_stopping import EarlyStopping
from train.toy import same, toy_config, toy_loader, toy_model, weights

TURNS = {2: (3.0, 3.0), 4: (2.0, 2.4), 6: (1.9, 2.3), 8: (1.0, 3.4), 10: (2.0, 2.6), 12: (1.8, 2.5), 14: (0.1, 0.1)}
"""Held-out losses of two languages by step: their mean is least at 6, the first's at 8 (before 14)."""


class Languages(Callback):
    """Adds the losses to the record, and keeps the weights of every validated step."""

    priority = 10

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Tensor]] = {}

    def validated(self, run: Run) -> None:
        run.record["loss_of"] = dict(zip(("en", "zh"), TURNS[run.position.step], strict=True))
        self.kept[run.position.step] = run.average.tensors() if run.average else weights(run.model)  # type: ignore
        self.kept[run.position.step] = {name: t.clone() for name, t in self.kept[run.position.step].items()}


class Killed(Callback):
    """Dies after a step."""

    priority = -50

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, run: Run) -> None:
        if run.position.step == self.step:
            raise RuntimeError("killed")


def run(directory: Path, *callbacks: Callback, **changes: Any) -> Transformer:
    model = toy_model()
    options: dict[str, Any] = {"steps": 14, "validate_every": 2, "checkpoint_every": 4, **changes}
    train(
        model,
        CausalLM(),
        toy_loader(),
        toy_config(**options),
        directory,
        validation=toy_loader(8, seed=1),
        callbacks=callbacks,
    )
    return model


MEAN = ("loss_of/en", "loss_of/zh")


@pytest.mark.parametrize("average", [None, 0.9])
def test_it_halts_at_the_best_mean_and_restores_those_weights(tmp_path: Path, average: float | None) -> None:
    languages = Languages()
    model = run(tmp_path, languages, EarlyStopping(2, MEAN), average=average)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 10, "two validations after the best one of step 6"
    assert records[-1]["best"] == {"value": pytest.approx(2.1), "step": 6}
    assert same(weights(model), languages.kept[6])
    assert same(load_file(tmp_path / "best" / "step-00000006" / "model.safetensors"), languages.kept[6])


def test_one_metric_patience_and_higher_is_better(tmp_path: Path) -> None:
    assert len(_records(tmp_path / "a", EarlyStopping(2, MEAN[:1]))) == 12
    assert len(_records(tmp_path / "b", EarlyStopping(5, MEAN))) == 14
    assert len(_records(tmp_path / "c", EarlyStopping(1, MEAN, min_delta=0.7))) == 6
    assert len(_records(tmp_path / "d", EarlyStopping(1, MEAN, higher_is_better=True))) == 4


def _records(directory: Path, stopping: EarlyStopping) -> list[dict[str, Any]]:
    run(directory, Languages(), stopping)
    return read_metrics(directory / "metrics.jsonl")


@pytest.mark.parametrize("step", [5, 7, 9])
def test_a_killed_run_decides_the_same_and_stays_stopped(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path / "whole", Languages(), EarlyStopping(2, MEAN))
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Languages(), EarlyStopping(2, MEAN), Killed(step))
    for _ in range(2):  # goes on; then there is nothing left to do
        again = run(tmp_path / "cut", Languages(), EarlyStopping(2, MEAN))
        assert same(weights(again), weights(whole))
        assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == 10


def test_old_bests_go_and_a_lost_best_is_named(tmp_path: Path) -> None:
    run(tmp_path, Languages(), EarlyStopping(9, MEAN), steps=14, keep_checkpoints=1)
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step-00000014"]
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(CheckpointError, match="weights of the last step"):
        run(tmp_path, Languages(), EarlyStopping(9, MEAN), steps=14, keep_checkpoints=1)


def test_the_validation_loss_is_the_default_and_unknown_figures_are_refused(tmp_path: Path) -> None:
    model = run(tmp_path / "a", EarlyStopping(3), steps=4)
    assert (tmp_path / "a" / "best" / "step-00000004").is_dir()
    assert not any(torch.isnan(p).any() for p in model.parameters())
    with pytest.raises(GristmillError, match="Did you mean validation_loss"):
        run(tmp_path / "b", EarlyStopping(3, ("validation_los",)), steps=4)
    for wrong in ({"patience": 0}, {"patience": 1, "metrics": ()}, {"patience": 1, "min_delta": -1.0}):
        with pytest.raises(GristmillError):
            EarlyStopping(**wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="waited"):
        EarlyStopping(1).load_state({"best": 1.0, "best_step": 1})

"""BERT's joint loss in the loop until it has converged, the same again after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gristmill.corpus.loader import ExampleLoader
from gristmill.errors import CheckpointError, GristmillError
from gristmill.objectives.bert import BertPretraining
from gristmill.train.callbacks import Callback, Run
from gristmill.train.checkpoint import Position
from gristmill.train.config import TrainConfig
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.convergence import Convergence
from objectives.cases_encoder import PRETRAINING_HEAD, VOCABULARY, headed, pair
from train.toy import same, weights

WINDOW, SHARE = 8, 0.04


class Killed(Callback):
    """Dies before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, run: Run) -> None:
        if run.position.step == self.step:
            raise RuntimeError("killed")


def run(directory: Path, *callbacks: Callback) -> tuple[dict[str, torch.Tensor], Position]:
    model, objective = headed(PRETRAINING_HEAD), BertPretraining(VOCABULARY)
    loader = ExampleLoader([pair(n) for n in range(8)], examples_per_batch=4, seed=3, prepare=objective.prepare)
    config = TrainConfig(steps=400, learning_rate=5e-3, schedule="constant", checkpoint_every=20)
    stop = Convergence(WINDOW, SHARE)
    position = train(model, objective, loader, config, directory, callbacks=[stop, *callbacks], validation=loader)
    return weights(model), position


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_bert_stops_when_its_loss_has_converged_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, position = run(tmp_path / "whole")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    losses = [record["loss"] for record in records]
    assert len(losses) == position.step < 400
    windows = [
        (mean(losses[end - 2 * WINDOW : end - WINDOW]), mean(losses[end - WINDOW : end]))
        for end in range(2 * WINDOW, len(losses) + 1)
    ]
    assert [before - now < SHARE * now for before, now in windows] == [False] * (len(windows) - 1) + [True]
    assert losses[-1] < 0.8 * losses[0], "it has learned before"
    assert "validation_loss" in records[-1], "the last step always measures it"
    again, _ = run(tmp_path / "again")
    assert same(again, whole), "a seeded run is reproducible"
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "cut", Killed(position.step - 3))
    for _ in range(2):  # goes on; then there is nothing left to do
        resumed, at = run(tmp_path / "cut")
        assert same(resumed, whole)
        assert at.step == position.step


def test_what_it_cannot_do_is_refused() -> None:
    for wrong in ({"window": 0}, {"share": -0.1}):
        with pytest.raises(GristmillError):
            Convergence(**wrong)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="losses"):
        Convergence().load_state({})

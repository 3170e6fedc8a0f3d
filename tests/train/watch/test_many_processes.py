"""Watching works on several processes: figures of the whole weights where they are sharded, bests that read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from gristmill.objectives.causal import CausalLM
from gristmill.train.callbacks import Callback, Run
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.mesh import stop
from gristmill.train.parallel.world import DistributedWorld
from gristmill.train.watch.activations import ActivationMonitor
from gristmill.train.watch.early_stopping import EarlyStopping
from gristmill.train.watch.monitors import SpeedMonitor, WeightMonitor
from gristmill.train.world import World
from train.parallel.small import LLAMA, small_config, small_model
from train.parallel.spawn import read, together, write
from train.toy import same, toy_loader, weights

LAYOUTS = {"shard": Parallel(shard=2), "tensor": Parallel(tensor=2)}


def in_full(model: Any, world: World) -> dict[str, Tensor]:
    return {
        n: t.clone() for n, t in (world.whole(model) if isinstance(world, DistributedWorld) else weights(model)).items()
    }


class Turn(Callback):
    """A figure that is least at step 2, and the weights of that step."""

    priority = 10
    best: dict[str, Tensor]

    def validated(self, run: Run) -> None:
        run.record["turn"] = abs(run.position.step - 2)
        if run.position.step == 2:
            self.best = in_full(run.model, run.world)


def watched(directory: Path, world: DistributedWorld | None = None) -> dict[str, dict[str, Tensor]]:
    """A run under watch; the weights that were best and the finished ones."""
    model, turn = small_model(LLAMA), Turn()
    config = small_config(steps=6, validate_every=1)
    monitors = [ActivationMonitor(every=2), WeightMonitor(every=2), SpeedMonitor(peak_flops=1e9)]
    callbacks = [turn, *monitors, EarlyStopping(2, ["turn"])]
    held_out = toy_loader(4, seed=1)
    train(model, CausalLM(), toy_loader(), config, directory, validation=held_out, callbacks=callbacks, world=world)
    return {"best": turn.best, "end": in_full(model, world or World())}


def run_all(directory: Path) -> None:
    for name, layout in LAYOUTS.items():
        found = watched(directory / name, DistributedWorld(start(layout, "cpu")))
        if dist.get_rank() == 0:
            write(directory / f"{name}.weights", found)
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("watched")
    together(run_all, 2, directory)
    write(directory / "one.weights", watched(directory / "one"))
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_figures_are_those_of_one_process(runs: Path, name: str) -> None:
    expected, found = (read_metrics(runs / run / "metrics.jsonl") for run in ("one", name))
    assert [len(records) for records in (expected, found)] == [4, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["best"] == theirs["best"]
        # tensor parallelism leaves the main process a part of each layer's weights and of its heads and units
        if name != "tensor":
            for key in ("gradient_norms", "weight_norms", "update_ratios", "dead_units"):
                assert ours.get(key, {}) == pytest.approx(theirs.get(key, {}), rel=1e-3)
        for layer, figures in theirs.get("activations", {}).items():
            assert ours["activations"][layer] == pytest.approx(figures, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_the_best_weights_come_back(runs: Path, name: str) -> None:
    found = read(runs / f"{name}.weights")
    assert same(found["best"], found["end"])

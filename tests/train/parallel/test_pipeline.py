"""A pipeline computes what one process does, in the order of its schedule; and so do its combinations."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gristmill.errors import GristmillError
from gristmill.model.config import FeedForwardConfig, LayerConfig, ModelConfig, MoEConfig, PositionConfig
from gristmill.objectives.causal import CausalLM
from gristmill.train.loop import loss_and_gradients, train
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.mesh import Mesh, stop
from gristmill.train.parallel.pipeline import PipelineWorld, ScheduleName, Stage, check_pipeline, stage_layers
from gristmill.train.precision import Precision
from gristmill.train.schedule_simulator import Job, one_after_another, one_forward_one_backward, simulate
from gristmill.train.world import LossModule
from train.parallel.small import EVERYTHING, LLAMA, curve, small_config, small_model, small_run
from train.parallel.spawn import read, together, write
from train.toy import toy_loader

DEEP = replace(EVERYTHING, num_hidden_layers=5)
MOE = replace(LLAMA, feed_forward=FeedForwardConfig(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24)))
ADAMW = {"micro_batches": 8, "learning_rate": 5e-3}
# sgd where thousands of weights are compared: AdamW makes a step of full size of a gradient that is all rounding
SGD = {"micro_batches": 8, "learning_rate": 0.1, "momentum": 0.9, "optimiser": "sgd"}
LAYOUTS: dict[str, tuple[ModelConfig, Parallel, ScheduleName, dict[str, Any]]] = {
    "pipeline_data_tensor": (LLAMA, Parallel(pipeline=2, data=2, tensor=2), "1f1b", ADAMW),
    "pipeline_data": (DEEP, Parallel(pipeline=4, data=2), "1f1b", SGD),
    "pipeline_tensor": (DEEP, Parallel(pipeline=4, tensor=2), "gpipe", SGD),
    "pipeline_expert": (MOE, Parallel(pipeline=2, data=2, expert=2), "gpipe", ADAMW),
}
RESUMED = "pipeline_data_tensor"


def run(name: str, directory: Path, mesh: Mesh, **changes: Any) -> None:
    config, _, schedule, options = LAYOUTS[name]
    model, world = small_model(config), PipelineWorld(mesh, schedule)
    training, held_out = small_config(**options | changes), toy_loader(14, seed=1)
    train(model, CausalLM(), toy_loader(), training, directory, validation=held_out, world=world)
    found = {key: tensor.clone() for key, tensor in world.whole(model).items()}
    write(directory.with_name(f"{directory.name}.{dist.get_rank()}"), found)


def traced(mesh: Mesh, micros: int, schedule: ScheduleName, path: Path) -> None:
    """One step of a pipeline of four: its gradients, and when it did what."""
    world = PipelineWorld(mesh, schedule)
    stage = world.wrap(LossModule(small_model(DEEP), CausalLM()))
    done: list[tuple[int, int, bool]] = []

    def note(_stage: Stage, _given: Any, named: dict[str, Any], out: torch.Tensor) -> None:
        micro = int(named["number"])
        done.append((time.monotonic_ns(), micro, False))
        out.register_hook(lambda _: done.append((time.monotonic_ns(), micro, True)))

    stage.register_forward_hook(note, with_kwargs=True)
    batches = [toy_loader().batch(number) for number in range(micros)]
    scale = 1 / (mesh.size("shares") * sum(batch.target_count for batch in batches))
    loss = world.backward(stage, batches, {"loss": scale}, Precision("float32", "cpu"))["loss"] * scale
    gradients = {name: p.grad for name, p in stage.model.named_parameters()}
    write(path.with_name(f"{path.name}.{dist.get_rank()}"), {"loss": loss, "gradients": gradients, "done": done})


def work(directory: Path) -> None:
    for name, (_, layout, *_) in LAYOUTS.items():
        run(name, directory / name, start(layout, "cpu"))
    mesh = start(LAYOUTS["pipeline_data"][1], "cpu")
    traced(mesh, 1, "gpipe", directory / "trace1")
    traced(mesh, 6, "1f1b", directory / "trace6")
    mesh = start(LAYOUTS[RESUMED][1], "cpu")
    run(RESUMED, directory / "half", mesh, checkpoint_every=2)
    if mesh.is_main:  # what is left is that of step 2
        (directory / "half" / "checkpoints" / "step-00000003").rename(directory / "lost")
    dist.barrier()
    run(RESUMED, directory / "half", mesh)
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    together(work, 8, directory)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_one_process(runs: Path, name: str, tmp_path: Path) -> None:
    expected = small_run(LAYOUTS[name][0], tmp_path, **LAYOUTS[name][3])
    for found, alone in zip(curve(runs / name), curve(tmp_path), strict=True):
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-5)
    first = read(runs / f"{name}.0")
    for rank in range(8):
        found = read(runs / f"{name}.{rank}")
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5, msg=lambda t, k=key: f"{k} {t}")
            assert torch.equal(found[key], first[key])


@pytest.mark.parametrize("micros", [1, 6])
def test_loss_and_gradients_are_those_of_one_process(runs: Path, micros: int) -> None:
    model = small_model(DEEP)
    loss = loss_and_gradients(model, CausalLM(), [toy_loader().batch(number) for number in range(micros)])["loss"]
    expected, seen = {name: p.grad for name, p in model.named_parameters()}, set()
    for rank in range(8):
        found = read(runs / f"trace{micros}.{rank}")
        assert 2 * found["loss"] == pytest.approx(loss, rel=1e-6)  # of each of two replicas
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
            seen.add(name)
    assert seen == expected.keys()


def test_without_micro_batches_stages_work_one_after_another(runs: Path) -> None:
    jobs = [(*item, rank // 2) for rank in (0, 2, 4, 6) for item in read(runs / f"trace1.{rank}")["done"]]
    trace = [Job(stage, micro, backward) for _, micro, backward, stage in sorted(jobs)]
    timeline = simulate(one_after_another(4))
    assert trace == timeline.trace
    assert [str(job) for job in trace] == [*(f"B{s},1↑" for s in (1, 2, 3, 4)), *(f"B{s},1↓" for s in (4, 3, 2, 1))]
    assert timeline.utilisation == pytest.approx(1 / 4)


def test_every_stage_works_in_the_order_of_the_schedule(runs: Path) -> None:
    schedule = one_forward_one_backward(4, 6)
    for stage in range(4):
        done = read(runs / f"trace6.{2 * stage}")["done"]
        assert tuple(Job(stage, micro, backward) for _, micro, backward in done) == schedule[stage]


@pytest.mark.parametrize(("stages", "micros", "bubble"), [(3, 3, 0.4), (4, 8, 3 / 11), (4, 6, 3 / 9)])
def test_the_bubble_is_reported(stages: int, micros: int, bubble: float) -> None:
    for schedule in ("1f1b", "gpipe"):
        world = PipelineWorld.__new__(PipelineWorld)
        world.schedule, world.parts = schedule, stages
        assert world.timeline(micros).bubble == pytest.approx(bubble)


def test_one_process_goes_on_with_the_checkpoint_of_a_pipeline(runs: Path, tmp_path: Path) -> None:
    expected = small_run(LLAMA, tmp_path, **ADAMW)
    half = runs / "half"
    newest = half / "checkpoints" / "step-00000003"
    newest.rename(tmp_path / "moved")
    found = small_run(LLAMA, half, **ADAMW)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_a_pipeline_goes_on_with_its_own_checkpoint(runs: Path) -> None:
    for found, expected in zip(curve(runs / "half"), curve(runs / RESUMED), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    for rank in range(8):
        found, expected = read(runs / f"half.{rank}"), read(runs / f"{RESUMED}.{rank}")
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)


def test_layers_are_dealt_evenly() -> None:
    assert stage_layers(DEEP, 4) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert stage_layers(replace(DEEP, num_hidden_layers=32), 4)[3] == range(24, 32)


def test_what_does_not_go_in_stages_is_refused_by_name() -> None:
    two = Parallel(pipeline=2)
    for name in ("shard", "context"):
        with pytest.raises(GristmillError, match=rf"does not go together with parallel\.{name}"):
            check_pipeline(LLAMA, Parallel(pipeline=2, **{name: 2}))
    with pytest.raises(GristmillError, match=r"positions\.bias"):
        check_pipeline(replace(LLAMA, positions=PositionConfig(bias="alibi")), two)
    with pytest.raises(GristmillError, match="layer 1 takes keys_from from layer 0"):
        check_pipeline(replace(LLAMA, layers=(LayerConfig(), LayerConfig(keys_from=0))), two)
    with pytest.raises(GristmillError, match="more than the model's 2 layers"):
        Parallel(pipeline=3).check_model(LLAMA)

"""Experts on several processes compute what all of them on one compute, however tokens are routed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gristmill.errors import GristmillError
from gristmill.model.config import FeedForwardConfig, MoEConfig
from gristmill.model.moe import MixtureOfExperts
from gristmill.model.transformer import Transformer
from gristmill.train.parallel import Parallel, start
from gristmill.train.parallel.data import sum_gradients
from gristmill.train.parallel.expert import expert_slice, split_experts
from gristmill.train.parallel.mesh import stop
from train.parallel.small import LLAMA, curve, small_run
from train.parallel.spawn import read, together, write

MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=24, shared_intermediate_size=16)
CONFIG = replace(LLAMA, feed_forward=FeedForwardConfig(moe=MOE))
LAYOUTS = {
    "expert": Parallel(expert=4),
    "data_expert": Parallel(data=2, expert=2),
    "context_expert": Parallel(context=2, expert=2),
}
ROUTINGS = {"even": None, "uneven": (3.0, 0.0, 0.0, -50.0), "one": (50.0, 50.0, -50.0, -50.0)}
"""Added to the experts' scores: nothing; expert 3 gets no token; experts 0 and 1, of one process, get all."""


def mixture(routing: str) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    moe = MixtureOfExperts(32, replace(MOE, scoring="sigmoid", correction_bias=True))
    assert moe.router.correction_bias is not None
    moe.router.correction_bias += torch.tensor(ROUTINGS[routing] or (0.0,) * 4)
    return torch.nn.ModuleDict({"mlp": moe})


def inputs(part: int) -> torch.Tensor:
    """Other tokens, and another number of them, on each of four processes."""
    return torch.randn(5 + part, 32, generator=torch.Generator().manual_seed(part))


def loss(model: torch.nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    return (model["mlp"](x) * torch.linspace(-1, 1, 32)).square().sum()


def work(directory: Path) -> None:
    mesh = start(LAYOUTS["data_expert"], "cpu")
    for routing in ROUTINGS:
        model, x = mixture(routing), inputs(dist.get_rank()).requires_grad_()
        slices = split_experts(model, mesh)
        out = model["mlp"](x)
        loss(model, x).backward()
        stacked = {name: p for name, p in model.named_parameters() if name in slices}
        others = [p for name, p in model.named_parameters() if name not in slices]
        assert all(p.grad is not None for p in stacked.values()), "an expert without tokens has a gradient of zero"
        sum_gradients(list(stacked.values()), mesh.group("expert_replicas"))
        sum_gradients(others, mesh.group("replicas"))
        found = {name: p.grad for name, p in model.named_parameters()}
        write(directory / f"{routing}.{dist.get_rank()}", {"out": out.detach(), "x": x.grad, **found})
    for name, layout in LAYOUTS.items():
        mesh = start(layout, "cpu")
        write(directory / f"{name}.{dist.get_rank()}", small_run(CONFIG, directory / name, mesh))
    stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    together(work, 4, directory)
    write(directory / "alone", small_run(CONFIG, directory / "alone_run"))
    return directory


@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_those_of_one_process(runs: Path, routing: str) -> None:
    model, parts = mixture(routing), [inputs(part).requires_grad_() for part in range(4)]
    outputs = [model["mlp"](x) for x in parts]
    torch.stack([loss(model, x) for x in parts]).sum().backward()
    for rank in range(4):
        found = read(runs / f"{routing}.{rank}")
        torch.testing.assert_close(found["out"], outputs[rank].detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["x"], parts[rank].grad, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            expected = parameter.grad
            if name.endswith(("gate_up_proj", "down_proj")) and "shared" not in name:
                expected = expert_slice(4).take(expected, rank % 2, 2)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5, msg=lambda told, n=name: n + told)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_one_process(runs: Path, name: str) -> None:
    for found, expected in zip(curve(runs / name), curve(runs / "alone_run"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for rank in range(4):
        weights, expected = read(runs / f"{name}.{rank}"), read(runs / "alone")
        assert weights.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(weights[key], expected[key], rtol=0, atol=1e-5)


def test_layouts_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(GristmillError, match=r"parallel\.expert \(3\) must divide moe\.num_experts \(4\)"):
        Parallel(expert=3).check_model(CONFIG)
    with pytest.raises(GristmillError, match="no mixture of experts"):
        Parallel(expert=2).check_model(Transformer(LLAMA).config)

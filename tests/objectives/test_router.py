"""Router losses beside a task: balance and small logits are trained by the loop, whatever else it does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.objective import ObjectiveCase, ObjectiveSuite
from gristmill.errors import CheckpointError, GristmillError
from gristmill.model.config import FeedForwardConfig, MoEConfig
from gristmill.model.moe import MixtureOfExperts, RouterStats, collect_router_stats, load_balancing_loss
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.router import BALANCE, TASK, WithRouterLosses, Z
from gristmill.pretrain import recipes
from gristmill.pretrain.config import PretrainConfig
from gristmill.pretrain.run import _callbacks
from gristmill.tokens.batch import PackedBatch
from gristmill.train.checkpoint import checkpoints, load_checkpoint
from gristmill.train.loop import loss_and_gradients, train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.router_bias import RouterBias
from gristmill.train.world import World
from train.toy import CONFIG, same, toy_config, toy_loader, toy_model

MOE = MoEConfig(num_experts=4, top_k=1, intermediate_size=16)
SEGMENTS = [([(7 * n + k) % 24 for k in range(5 + 3 * n)], None) for n in range(6)]


def mixture(*, planted: bool = False, bias: bool = False) -> Transformer:
    """A small decoder; `planted`: nearly all tokens prefer expert 0."""
    config = replace(CONFIG, feed_forward=FeedForwardConfig(moe=replace(MOE, correction_bias=bias)))
    model = Transformer(config)
    model.initialise(0)
    if planted:
        batch = toy_loader(rows=8).batch(0)
        for _ in range(20):  # along the mean of what each router reads
            inputs: dict[torch.nn.Module, torch.Tensor] = {}

            def keep(router: torch.nn.Module, x: Any, inputs: dict[Any, torch.Tensor] = inputs) -> None:
                inputs[router] = x[0].mean(dim=0)

            routers = [part.router for part in mixtures(model).values()]
            handles = [router.register_forward_pre_hook(keep) for router in routers]
            with torch.no_grad():
                CausalLM().loss_sum(model, batch)
                for router, handle in zip(routers, handles, strict=True):
                    router.weight[0] += 0.1 * inputs[router]
                    handle.remove()
    return model


def mixtures(model: torch.nn.Module) -> dict[str, MixtureOfExperts]:
    return {name: part for name, part in model.named_modules() if isinstance(part, MixtureOfExperts)}


def loads(model: Transformer) -> list[float]:
    """Tokens of the busiest expert / the mean, by layer, without the rows that round up."""
    batch = toy_loader(rows=8).batch(1)
    with torch.no_grad(), collect_router_stats(model) as stats:
        CausalLM().loss_sum(model.eval(), batch)
    found = []
    for name in stats.layers:
        counts = torch.bincount(stats.layers[name][0].experts[: batch.tokens].flatten(), minlength=4)
        found.append(float(counts.max() / counts.float().mean()))
    return found


def run(directory: Path, model: Transformer, objective: Any, **options: Any) -> Transformer:
    config = toy_config(steps=60, checkpoint_every=20, **options.pop("config", {}))
    train(model, objective, toy_loader(rows=4), config, directory, show_progress=False, **options)
    return model


CASE = ObjectiveCase(
    "router",
    WithRouterLosses(CausalLM()),
    mixture,
    lambda number: SEGMENTS[number % len(SEGMENTS)],
    {"empty": ([], None), "mask of another length": ([5, 6], [1])},
    {TASK: math.log(24), BALANCE: 1.0, Z: math.log(4) ** 2},
    random=False,
    falls_to=0.7,
)


@pytest.mark.parametrize("case", [CASE], ids=str)
class TestRouterLosses(ObjectiveSuite):
    """The contract but for what is said of the balance: it depends on how examples are dealt into batches."""

    test_neighbours_change_nothing = None  # type: ignore[assignment]
    test_the_gradient_is_the_same_for_any_dealing = None  # type: ignore[assignment]


def test_sums_are_the_means_of_layers_over_the_real_tokens() -> None:
    model, objective = mixture(), WithRouterLosses(CausalLM())
    batch = objective.prepare(SEGMENTS, [(0,)] * 6)
    assert batch.tokens % 256, "rows are rounded up, and what is added must not count"
    sums, counts = objective.loss_sums(model, batch), objective.counts(batch)
    assert objective.weights == {TASK: 1.0, BALANCE: 0.01, Z: 0.001}
    assert counts == {TASK: batch.target_count, BALANCE: batch.tokens, Z: batch.tokens}
    assert torch.equal(sums[TASK], CausalLM().loss_sum(model, batch)[0])
    with collect_router_stats(model) as stats:
        for ids, _ in SEGMENTS:  # one by one, nothing is added
            model(torch.tensor(ids))
    logits = [torch.cat([routing.logits for routing in layer]) for layer in stats.layers.values()]
    z = torch.stack([part.exp().sum(dim=1).log().square().mean() for part in logits]).mean()
    assert float(sums[Z].detach()) / counts[Z] == pytest.approx(float(z.detach()), rel=1e-4)
    balance = [load_balancing_loss(RouterStats({name: layer})) for name, layer in stats.layers.items()]
    expected = float(torch.stack(balance).mean().detach())
    assert float(sums[BALANCE].detach()) / counts[BALANCE] == pytest.approx(expected, rel=1e-4)


def test_only_the_balance_depends_on_how_segments_are_dealt() -> None:
    def gradient(parts: list[PackedBatch], **weights: float) -> torch.Tensor:
        model = mixture(planted=True).double()
        loss_and_gradients(model, WithRouterLosses(CausalLM(), **weights), parts)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, dealt = [PackedBatch.from_segments(SEGMENTS)], [PackedBatch.from_segments([part]) for part in SEGMENTS]
    z = [gradient(parts, balance=0.0, z=1.0) for parts in (whole, dealt)]
    assert float((z[0] - z[1]).abs().max()) < 1e-6 * max(1.0, float(z[0].abs().max()))
    balance = [gradient(parts, balance=1.0, z=0.0) for parts in (whole, dealt)]
    assert float((balance[0] - balance[1]).abs().max()) > 1e-4


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = mixture()
        model.checkpoint_activations = recompute
        loss_and_gradients(model, WithRouterLosses(CausalLM(), balance=1.0), [PackedBatch.from_segments(SEGMENTS)])
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert same(*found)
    assert "layers.0.mlp.router.weight" in found[0]


def test_a_planted_imbalance_is_trained_away(tmp_path: Path) -> None:
    assert min(loads(mixture(planted=True))) > 2.2
    without = run(tmp_path / "without", mixture(planted=True), CausalLM())
    model = run(tmp_path / "with", mixture(planted=True), WithRouterLosses(CausalLM(), balance=0.3))
    assert min(loads(without)) > 2.0
    assert max(loads(model)) < 1.5
    records = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert records[-1][BALANCE] < 1.15 < records[0][BALANCE]
    assert records[-1][TASK] < records[0][TASK]
    for record in records:
        assert record["loss"] == pytest.approx(record[TASK] + 0.3 * record[BALANCE] + 0.001 * record[Z], rel=1e-5)


def test_the_bias_balances_without_a_loss_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def biased(directory: Path, **options: Any) -> Transformer:
        start = mixture(planted=True, bias=True)
        return run(directory, start, CausalLM(), callbacks=[RouterBias(0.005)], **options)

    model = biased(tmp_path / "whole", config={"checkpoint_activations": True})
    assert max(loads(model)) < 1.6
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    busiest = [max(record["expert_load"].values()) for record in records]
    assert sum(busiest[:5]) / 5 > 2.2
    assert sum(busiest[-10:]) / 10 < 1.6

    class Crash(CausalLM):
        calls = 0

        def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> Any:
            self.calls += 1
            if self.calls == 30:
                raise RuntimeError("crash")
            return super().loss_sum(model, batch)

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "cut", mixture(planted=True, bias=True), Crash(), callbacks=[RouterBias(0.005)])
    resumed = biased(tmp_path / "cut")
    plain = World().whole(model)
    assert "layers.0.mlp.router.correction_bias" in plain
    assert same(World().whole(resumed), plain), "recomputation and the interruption change nothing"
    again = mixture(bias=True)
    load_checkpoint(checkpoints(tmp_path / "cut" / "checkpoints")[-1], again)
    assert same(World().whole(again), plain)


def test_what_cannot_be_balanced_is_refused(tmp_path: Path) -> None:
    batch = PackedBatch.from_segments(SEGMENTS)
    with pytest.raises(CheckpointError, match="no mixture of experts"):
        WithRouterLosses(CausalLM()).loss_sums(toy_model(), batch)
    for wrong in ({"balance": -1.0}, {"z": float("nan")}):
        with pytest.raises(GristmillError, match="weight of the router"):
            WithRouterLosses(CausalLM(), **wrong)
    with pytest.raises(GristmillError, match="rate"):
        RouterBias(0.0)
    with pytest.raises(GristmillError, match="correction_bias"):
        run(tmp_path, mixture(), CausalLM(), callbacks=[RouterBias()])
    with pytest.raises(GristmillError, match="compile"):
        run(tmp_path, mixture(bias=True), CausalLM(), callbacks=[RouterBias()], config={"compile": True})


def test_a_pretraining_run_of_a_mixture_trains_its_balance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "preset", lambda name, size: replace(mixture(bias=True).config, vocab_size=size))
    config = PretrainConfig(tmp_path, data="text.txt", row_length=32)
    tokenizer: Any = SimpleNamespace(vocab_size=24)
    recipe = recipes.build(config, tokenizer)
    assert set(recipe.objective.weights) == {TASK, BALANCE, Z}
    assert [type(callback) for callback in _callbacks(config, tokenizer, recipe, toy_loader())] == [RouterBias]
    monkeypatch.setattr(recipes, "preset", lambda name, size: replace(CONFIG, vocab_size=size))
    recipe = recipes.build(config, tokenizer)
    assert type(recipe.objective) is CausalLM
    assert not _callbacks(config, tokenizer, recipe, toy_loader())

"""The training loop: what a step does, what it records and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import CheckpointError, GristmillError
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.checkpoint import checkpoints, load_checkpoint
from gristmill.train.loop import loss_and_gradients, mean_losses, train
from gristmill.train.metrics import read_metrics
from gristmill.train.optimisers import make_optimiser
from gristmill.train.precision import Precision
from gristmill.train.world import LossModule, World
from train.toy import Hooked, same, toy_config, toy_loader, toy_model, toy_run, weights


def segments(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 12, (1,), generator=draw))
        ids = torch.randint(24, (length,), generator=draw).tolist()
        made.append((ids, [1, 1, *torch.randint(2, (length - 2,), generator=draw).tolist()]))
    return made


def held_out_loss(loader: Any) -> float:
    module = LossModule(toy_model(), CausalLM())
    return mean_losses(module, CausalLM(), loader, World(), Precision("float32", "cpu"))["loss"]


def gradients(batches: list[PackedBatch]) -> tuple[float, dict[str, Tensor]]:
    model = toy_model()
    loss = loss_and_gradients(model, CausalLM(), batches)["loss"]
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_falls_on_what_can_be_learned(tmp_path: Path) -> None:
    toy_run(tmp_path, toy_config(steps=90))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert abs(records[0]["loss"] - math.log(24)) < 0.2, "at first it guesses"
    assert records[-1]["loss"] < 0.5
    assert records[-1]["validation_loss"] < 0.5, "on sequences that it has not seen"


def test_a_masked_token_is_not_learned(tmp_path: Path) -> None:
    batch = PackedBatch.from_segments([([3, 4, 5], [0, 0, 1])])
    _, found = gradients([batch])
    _, short = gradients([PackedBatch.from_segments([([3, 4, 5], [0, 0, 1]), ([7, 8, 9], [0, 0, 0])])])
    assert all(torch.allclose(found[name], short[name], atol=1e-7) for name in found)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_gradient_does_not_depend_on_how_segments_are_dealt(sizes: list[int]) -> None:
    items = segments(sum(sizes))
    parts, rest = [], list(items)
    for size in sizes:
        parts.append(PackedBatch.from_segments(rest[:size]))
        del rest[:size]
    loss, split = gradients(parts)
    whole_loss, whole = gradients([PackedBatch.from_segments(items)])
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert split.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-6, rtol=1e-4)


def test_the_mean_is_over_targets_and_not_over_batches() -> None:
    long, short = ([1, 2, 3, 4, 5, 6, 7, 8], None), ([9, 9], None)
    model = toy_model()
    sums = [CausalLM().loss_sum(model, PackedBatch.from_segments([part])) for part in (long, short)]
    loss, _ = gradients([PackedBatch.from_segments([part]) for part in (long, short)])
    assert loss == pytest.approx(sum(float(total.detach()) for total, _ in sums) / 8, rel=1e-6)


def test_a_step_with_every_target_masked_is_refused() -> None:
    batch = PackedBatch.from_segments([([1, 2, 3], [1, 0, 0])])
    with pytest.raises(GristmillError, match="every target is masked"):
        gradients([batch, batch])


def test_held_out_data_without_a_target_are_refused() -> None:
    class Nothing:
        batches_per_epoch = 1

        def batch(self, step: int) -> PackedBatch:
            return PackedBatch.from_segments([([1, 2, 3], [0, 0, 0])])

    with pytest.raises(GristmillError, match="held-out"):
        held_out_loss(Nothing())


def test_matrices_decay_and_vectors_do_not() -> None:
    model = toy_model()
    decayed, kept = make_optimiser(model, "adamw", learning_rate=1e-3, weight_decay=0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(parameter)] for parameter in kept["params"])
    assert not any("norm" in names[id(parameter)] for parameter in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names), "the tied matrix is optimised once"


def test_ten_steps_equal_a_plain_loop_with_adamw_and_clipping(tmp_path: Path) -> None:
    model = toy_run(tmp_path, toy_config(steps=10, clip_norm=0.05, warmup=0.0))
    plain, loader = toy_model(), toy_loader()
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    rates = torch.linspace(1e-2, 0.0, 10).tolist()
    losses = []
    for step, rate in enumerate(rates):
        batch = loader.batch(step)
        logits = torch.cat([plain(part) for part in batch.input_ids.split(list(batch.segment_lengths))])
        loss = torch.nn.functional.cross_entropy(logits, batch.target_ids)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["loss"] for record in records] == pytest.approx(losses, abs=1e-5)
    assert [record["learning_rate"] for record in records] == pytest.approx(rates, abs=1e-9)
    assert all(record["gradient_norm"] > 0.05 for record in records), "the norm before clipping"


def test_micro_batches_make_one_step(tmp_path: Path) -> None:
    one = toy_run(tmp_path / "one", toy_config(steps=4, micro_batches=3))
    loader, model = toy_loader(), toy_model()

    class Joined:
        batches_per_epoch = 1

        def batch(self, step: int) -> PackedBatch:
            parts = [loader.batch(3 * step + number) for number in range(3)]
            ids = [torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "target_ids")]
            positions = torch.cat([part.position_ids for part in parts])
            return PackedBatch(*ids, positions, sum((part.segment_lengths for part in parts), ()))

    train(model, CausalLM(), Joined(), toy_config(steps=4), tmp_path / "two")
    for ours, theirs in zip(one.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_metrics_have_each_step_once_and_count_tokens(tmp_path: Path) -> None:
    toy_run(tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 31))
    loader, seen = toy_loader(), 0
    for step, record in enumerate(records):
        seen += len(loader.batch(step).input_ids)
        assert record["tokens"] == seen
        assert record["tokens_per_second"] > 0
        assert ("validation_loss" in record) == (record["step"] % 7 == 0 or record["step"] == 30)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    toy_run(tmp_path, toy_config(keep_checkpoints=keep))
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000024", "step-00000028", "step-00000030"][-keep:]


@pytest.mark.parametrize("what", ["weights", "validation"])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path: Path, what: str) -> None:
    class Broken(Hooked):
        def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
            total, count = super().loss_sum(model, batch)
            spoilt = self.calls == 7 and (what == "weights" or not model.training)
            return (total * float("nan") if spoilt else total), count

    with pytest.raises(GristmillError, match=r"step 7: .*nan.*last checkpoint is whole"):
        toy_run(tmp_path, objective=Broken(lambda _: None))
    (standing,) = checkpoints(tmp_path / "checkpoints")
    assert standing.name == "step-00000004"
    assert load_checkpoint(standing, toy_model(), identity="toy").step == 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_bfloat16_learns_and_keeps_float32_weights(tmp_path: Path) -> None:
    model = toy_run(tmp_path, toy_config(steps=60, precision="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["validation_loss"] < 0.6
    exact = toy_run(tmp_path / "exact", toy_config(steps=60))
    assert not same(weights(model), weights(exact)), "the products really were in another type"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    toy_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings \(it says toy, this run is other\)"):
        train(toy_model(), CausalLM(), toy_loader(), toy_config(), tmp_path, identity="other")


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    toy_run(tmp_path)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    for change, match in (
        ({"num_hidden_layers": 3}, r"missing.*layers\.2\."),
        ({"num_hidden_layers": 1}, r"no place.*layers\.1\."),
        ({"intermediate_size": 48}, r"layers\.0\.mlp\..*has shape"),
    ):
        model = type(toy_model())(replace(toy_model().config, **change))
        model.initialise(1)
        before = weights(model)
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(path, model)
        assert same(weights(model), before)


def test_optimiser_state_is_loaded_beside_the_weights_whole_or_not_at_all(tmp_path: Path) -> None:
    toy_run(tmp_path)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    model = toy_model()
    optimiser = make_optimiser(model, "adamw", learning_rate=1e-2)
    position = load_checkpoint(path, model, optimiser, identity="toy")
    assert position.step == 30
    assert all(float(optimiser.state[parameter]["step"]) == 30 for parameter in model.parameters())
    other = toy_model()
    (path / "optimiser.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="optimiser"):
        load_checkpoint(path, other, make_optimiser(other, "adamw", learning_rate=1e-2), identity="toy")
    assert same(weights(other), weights(toy_model()))


def test_validation_batches_go_to_the_device_of_the_model() -> None:
    moved = []

    class Watched(PackedBatch):
        def to(self, device: torch.device | str) -> PackedBatch:
            moved.append(str(device))
            return super().to(device)

    class Loader:
        batches_per_epoch = 2

        def batch(self, step: int) -> PackedBatch:
            return Watched.from_segments([([1, 2, 3], None)])

    held_out_loss(Loader())
    assert moved == ["cpu", "cpu"]


def test_the_gradient_is_that_of_the_mean_loss_itself() -> None:
    """Its size too: Adam and clipping would hide a wrong divisor."""
    batch = PackedBatch.from_segments(segments(5))
    _, found = gradients([batch])
    model = toy_model()
    total, count = CausalLM().loss_sum(model, batch)
    (total / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-5)

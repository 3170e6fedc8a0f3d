"""Monitors record what one computes by hand, alarms fire on planted faults, and a watched run is the same run."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import GristmillError
from gristmill.model.config import FeedForwardConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.callbacks import Callback, Run
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.activations import ActivationMonitor
from gristmill.train.watch.monitors import (
    Alarms,
    Limit,
    MemoryMonitor,
    SpeedMonitor,
    WeightMonitor,
    flat,
    mean_attended,
    measured_peak_flops,
    norms,
)
from train.toy import CONFIG, same, toy_config, toy_loader, toy_model, weights


class Spy(Callback):
    """Keeps gradients and weights of every step, and runs last."""

    priority = -99

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def start(self, run: Run) -> None:
        self.weights.append(weights(run.model))  # type: ignore[arg-type]

    def gradients_ready(self, run: Run) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    def after_step(self, run: Run) -> None:
        self.weights.append(weights(run.model))  # type: ignore[arg-type]


def run(
    directory: Path,
    *callbacks: Callback,
    model: Transformer | None = None,
    objective: CausalLM | None = None,
    **changes: Any,
) -> tuple[Transformer, list[dict[str, Any]]]:
    """Train, and the records."""
    model = model or toy_model()
    train(model, objective or CausalLM(), toy_loader(), toy_config(**changes), directory, callbacks=callbacks)
    return model, read_metrics(directory / "metrics.jsonl")


def hand_norm(tensors: dict[str, Tensor], prefix: str) -> float:
    return math.sqrt(sum(float(x) ** 2 for n, t in tensors.items() if n.startswith(prefix) for x in t.flatten()))


def test_norms_of_gradients_weights_and_updates_equal_sums_by_hand(tmp_path: Path) -> None:
    spy = Spy()
    _, records = run(tmp_path, WeightMonitor(every=2), spy, steps=4, clip_norm=1e-3)
    assert ["gradient_norms" in record for record in records] == [False, True, False, True]
    record, before, after = records[1], spy.weights[1], spy.weights[2]
    assert set(record["gradient_norms"]) == {"embed_tokens", "layers.0", "layers.1", "norm"}, "the head is tied"
    for group, value in record["gradient_norms"].items():
        assert value == pytest.approx(hand_norm(spy.gradients[1], group + "."), rel=1e-5)
        size = hand_norm(before, group + ".")
        change = hand_norm({name: after[name] - before[name] for name in before}, group + ".")
        assert record["weight_norms"][group] == pytest.approx(size, rel=1e-5)
        assert record["update_ratios"][group] == pytest.approx(change / size, rel=1e-4)
    assert math.hypot(*record["gradient_norms"].values()) == pytest.approx(record["gradient_norm"], rel=1e-5)


def test_norms_are_grouped_by_layer_and_tell_what_is_not_finite() -> None:
    tensors = {
        "encoder.layers.0.mlp.up_proj.weight": torch.tensor([3.0]),
        "encoder.layers.0.norm.weight": torch.tensor([4.0]),
        "encoder.layers.10.norm.weight": torch.tensor([1.0]),
        "bias": torch.tensor([math.inf]),
    }
    assert norms(tensors) == {"encoder.layers.0": 5.0, "encoder.layers.10": 1.0, "bias": None}


class Noisy(CausalLM):
    """An objective that draws while it computes."""

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        total, count = super().loss_sum(model, batch)
        return total * (1.0 + torch.rand(())), count


def test_a_watched_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", objective=Noisy(), steps=6)
    monitors = (ActivationMonitor(every=2), WeightMonitor(every=3), SpeedMonitor(peak_flops=1e9), MemoryMonitor())
    watched, records = run(tmp_path / "watched", *monitors, Alarms(), objective=Noisy(), steps=6)
    assert same(weights(plain), weights(watched))
    assert ["activations" in record for record in records] == [False, True] * 3


def test_mfu_is_the_models_own_operations_over_the_peak(tmp_path: Path) -> None:
    _, records = run(tmp_path, SpeedMonitor(peak_flops=1e9), MemoryMonitor(), steps=2)
    for step, record in enumerate(records):
        lengths = toy_loader().batch(step).segment_lengths
        seen = [position + 1 for length in lengths for position in range(length)]
        dense = sum(p.numel() for p in toy_model().parameters() if p.ndim == 2)  # the embedding is the head as well
        # scores and values of two heads of 8, in two layers, two operations per multiply-add, thrice with the backward
        operations = 6 * dense + 3 * 2 * 2 * (2 * 16) * sum(seen) / len(seen)
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * operations / 1e9, rel=1e-6)
        assert record["peak_memory_bytes"] > 10_000_000


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_mean_attended_length_counts_pairs(lengths: list[int]) -> None:
    batch = PackedBatch.from_segments([([1] * length, None) for length in lengths])
    for causal in (True, False):
        pairs = [k <= q or not causal for length in lengths for q in range(length) for k in range(length)]
        assert mean_attended([batch, batch], causal=causal) == pytest.approx(sum(pairs) / sum(lengths))


def test_speed_needs_what_it_cannot_know(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="peak_flops"):
        SpeedMonitor(peak_flops=0.0)
    with pytest.raises(GristmillError, match="segment_lengths"):
        mean_attended([object()], causal=True)
    assert 1e8 < measured_peak_flops("cpu", torch.float32, seconds=0.05) < 1e14


@pytest.mark.parametrize(
    ("fault", "alarm"),
    [
        ("huge", "activations/layers.1/max_abs"),
        ("sharp", "attention_entropy/layers.0/share"),
        ("dead", "dead_units/layers.0"),
        ("cut", "gradient_norms/layers.0"),
        ("rate", "update_ratios/layers.1"),
    ],
)
def test_planted_faults_raise_their_alarm_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, alarm: str
) -> None:
    model = Transformer(replace(CONFIG, feed_forward=FeedForwardConfig(activation="relu", gated=False)))
    model.initialise(0)
    changes: dict[str, Any] = {"learning_rate": 1e-4}
    with torch.no_grad():
        if fault == "huge":
            model.layers[1].mlp.down_proj.weight.mul_(1e7)
        elif fault == "sharp":
            model.layers[0].self_attn.qkv_proj.weight.mul_(1e4)
        elif fault == "dead":
            model.layers[0].mlp.up_proj.weight[:20].zero_()
        elif fault == "cut":
            for parameter in model.layers[0].parameters():
                parameter.register_hook(lambda gradient: gradient * 0.0)
        else:
            changes = {"learning_rate": 1.0, "warmup": 0.0}
    monitors = (ActivationMonitor(every=1), WeightMonitor(every=1), Alarms())
    _, records = run(tmp_path, *monitors, model=model, steps=3, **changes)
    told = capsys.readouterr().err
    assert any(text.startswith(f"{alarm} is ") for text in records[0]["alarms"])
    assert told.count(f"{alarm} is ") == 1


def test_a_healthy_toy_run_raises_none(tmp_path: Path) -> None:
    _, records = run(
        tmp_path, ActivationMonitor(every=1), WeightMonitor(every=1), Alarms(), steps=8, learning_rate=1e-3
    )
    assert not any("alarms" in record for record in records)


def test_limits_say_what_is_wrong_and_null_is_always_wrong() -> None:
    limit = Limit("x", above=2.0, below=1.0)
    assert limit.broken_by(1.5) is None
    assert limit.broken_by(3.0) == "3, above 2"
    assert limit.broken_by(0.5) == "0.5, below 1"
    assert limit.broken_by(None) == "not finite"


def test_flat_names_every_number() -> None:
    record = {"loss": 1, "ok": True, "a": {"b": {"c": 2.5}, "d": None}, "alarms": ["x"], "skipped": "why"}
    assert dict(flat(record)) == {"loss": 1, "a/b/c": 2.5, "a/d": None}

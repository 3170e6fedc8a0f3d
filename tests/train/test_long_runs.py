"""What keeps a long run going: budgets, growing batches, bad steps, callbacks, averages, precision, recomputation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gristmill.errors import GristmillError
from gristmill.model.block import Block
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train.callbacks import Callback, Run
from gristmill.train.checkpoint import checkpoints
from gristmill.train.config import TrainConfig
from gristmill.train.loop import loss_and_gradients, train
from gristmill.train.metrics import read_metrics
from gristmill.train.prepare import prepare_model
from model.peak import peak_bytes
from processes import finish, start
from train.toy import CONFIG, Hooked, same, toy_config, toy_loader, toy_model, toy_run, weights


def run(directory: Path, config: TrainConfig, **options: Any) -> Any:
    model = toy_model()
    position = train(model, options.pop("objective", CausalLM()), toy_loader(), config, directory, **options)
    return model, position


def interrupted(directory: Path, config: TrainConfig, at: int, **options: Any) -> Any:
    """The run, stopped as by a crash before step `at` is taken, then gone on with."""

    def crash(call: int) -> None:
        if call == at:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        run(directory, config, objective=Hooked(crash), **options)
    return run(directory, config, **options)


def test_a_run_is_as_long_as_its_tokens(tmp_path: Path) -> None:
    _, position = run(tmp_path, TrainConfig(tokens=2000, learning_rate=1e-2, warmup=0.2))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["tokens"] >= 2000 > records[-2]["tokens"]
    assert position.tokens == records[-1]["tokens"]
    for record in records:  # the rate is that of the tokens at the end of the step
        done = min(record["tokens"] / 2000, 1.0)
        expected = 1e-2 * (done / 0.2 if done < 0.2 else (1 - done) / 0.8)
        assert record["learning_rate"] == pytest.approx(expected, abs=1e-12)


def test_batches_grow_at_their_tokens_and_a_step_is_one_large_batch(tmp_path: Path) -> None:
    config = TrainConfig(tokens=2500, batch_growth=((600, 2), (1500, 4)), warmup=0.0, learning_rate=1e-2)
    model, position = run(tmp_path, config)
    loader, number, tokens = toy_loader(), 0, 0
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        size = 1 if tokens < 600 else 2 if tokens < 1500 else 4
        tokens += sum(loader.batch(number + index).tokens for index in range(size))
        number += size
        assert record["tokens"] == tokens
    assert position.batches == number
    resumed, _ = interrupted(tmp_path / "again", config, 9)
    assert same(weights(resumed), weights(model))


class Spoilt(Hooked):
    """Not finite, or far too large, at the given training batches."""

    def __init__(self, at: set[int], factor: float) -> None:
        super().__init__(lambda _: None)
        self.at, self.factor = at, factor

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        total, count = super().loss_sum(model, batch)
        return (total * self.factor if self.calls in self.at and model.training else total), count


def test_a_bad_batch_is_skipped_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(on_bad_step="skip")
    model, position = run(tmp_path, config, objective=Spoilt({7}, math.nan))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "skipped" in record] == [7]
    assert "not finite" in records[6]["skipped"]
    assert position.bad_steps == 1
    kept = tmp_path / "bad_batches" / "step-00000007"
    assert json.loads((kept / "batch.json").read_text())["step"] == 7
    assert "step 7" in capsys.readouterr().err
    assert all(bool(weight.isfinite().all()) for weight in weights(model).values())
    # the same as a run in which that step has no update
    still = toy_model()
    before: dict[str, Tensor] = {}

    class Undo(Callback):
        def before_step(self, run: Run) -> None:
            before.update(weights(run.model) if run.position.step == 6 else {})

        def after_step(self, run: Run) -> None:
            if run.position.step == 7:
                assert same(weights(run.model), before)

    train(still, Spoilt({7}, math.nan), toy_loader(), config, tmp_path / "watched", callbacks=[Undo()])
    assert same(weights(still), weights(model))


def test_a_spike_rewinds_and_the_data_go_on_behind_it(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watch(Callback):
        def before_step(self, run: Run) -> None:
            seen.append((run.position.step, run.position.batches))

    config = toy_config(steps=40, on_bad_step="rewind", spike=8.0)
    model, position = run(tmp_path, config, objective=Spoilt({31}, 50.0), callbacks=[Watch()])
    assert seen[30] == (30, 30)
    assert seen[31] == (28, 31), "back to the checkpoint of step 28, on with batch 31"
    assert position.step == 40
    assert position.batches == 43
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 41)), "each step has one record, that of the weights that stay"
    assert all(bool(weight.isfinite().all()) for weight in weights(model).values())


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    config = toy_config(on_bad_step="skip", most_bad_steps=2)
    with pytest.raises(GristmillError, match="bad step 3, and most_bad_steps is 2"):
        run(tmp_path, config, objective=Spoilt({3, 5, 9}, math.inf))


def test_nothing_to_rewind_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="no checkpoint to rewind to"):
        run(tmp_path, toy_config(on_bad_step="rewind"), objective=Spoilt({2}, math.nan))


class Counting(Callback):
    """Counts steps and stops at the twelfth."""

    def __init__(self, calls: list[str], name: str, priority: int, stop_at: int = 0) -> None:
        self.calls, self.own, self.priority, self.steps, self.stop_at = calls, name, priority, 0, stop_at

    @property
    def name(self) -> str:
        return self.own

    def after_step(self, run: Run) -> None:
        self.steps += 1
        self.calls.append(self.own)
        run.record[self.own] = self.steps
        if self.steps == self.stop_at:
            run.stop("enough")

    def end(self, run: Run) -> None:
        self.calls.append(f"{self.own} ends")

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_callbacks_go_by_priority_add_records_and_keep_their_state(tmp_path: Path) -> None:
    calls: list[str] = []
    config = toy_config(steps=20)

    def both() -> list[Callback]:
        return [Counting(calls, "low", 1), Counting(calls, "high", 5, stop_at=12)]

    def crash(call: int) -> None:
        if call == 7:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, config, objective=Hooked(crash), callbacks=both())
    assert calls == ["high", "low"] * 6
    calls.clear()
    _, position = run(tmp_path, config, callbacks=both())
    assert position.step == 12, "counted on from the checkpoint of step 4"
    assert calls == ["high", "low"] * 8 + ["high ends", "low ends"]
    assert [r["high"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000012"


def test_two_callbacks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="one name"):
        run(tmp_path, toy_config(), callbacks=[Counting([], "a", 0), Counting([], "a", 1)])


@pytest.mark.parametrize(
    "options",
    [
        {"optimiser": "muon", "schedule": "wsd"},
        {"optimiser": "lion", "learning_rate": 1e-3, "schedule": "cosine"},
        {"optimiser": "adafactor"},
        {"optimiser": "sgd", "momentum": 0.9, "schedule": "constant"},
        {"average": 0.9},
        {"precision": "float16"},
        {"precision": "pure_bfloat16", "schedule": "inverse_sqrt"},
        {"checkpoint_activations": True, "dropout": 0.1},
        {"background_checkpoints": False, "micro_batches": 2},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_every_way_of_training_resumes_bit_for_bit_and_learns(tmp_path: Path, options: dict[str, Any]) -> None:
    config = toy_config(steps=24, **{"learning_rate": 2e-2, **options})
    whole, _ = run(tmp_path / "whole", config, validation=toy_loader(8, seed=1))
    resumed, _ = interrupted(tmp_path / "resumed", config, 15, validation=toy_loader(8, seed=1))
    assert same(weights(whole), weights(resumed))
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    measured = [
        [r.get("validation_loss") for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("whole", "resumed")
    ]
    assert measured[0] == measured[1]


def test_validation_and_the_model_in_the_end_have_the_averaged_weights(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "plain", toy_config(steps=10))
    config = toy_config(steps=10, average=0.5)
    averaged, _ = run(tmp_path / "average", config, validation=toy_loader(8, seed=1))
    expected = weights(toy_model())
    path: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def after_step(self, run: Run) -> None:
            path.append(weights(run.model))

    run(tmp_path / "path", toy_config(steps=10), callbacks=[Watch()])
    for step in path:
        expected = {name: 0.5 * value + 0.5 * step[name] for name, value in expected.items()}
    for name, value in weights(averaged).items():
        torch.testing.assert_close(value, expected[name])
    assert same(path[-1], weights(plain))
    loader = toy_loader(8, seed=1)
    batches = [loader.batch(number) for number in range(loader.batches_per_epoch)]
    held_out = sum(float(CausalLM().loss_sum(averaged, batch)[0].detach()) for batch in batches)
    count = sum(batch.target_count for batch in batches)
    assert read_metrics(tmp_path / "average" / "metrics.jsonl")[-1]["validation_loss"] == pytest.approx(
        held_out / count, rel=1e-4
    )


def test_recomputed_activations_change_no_gradient_and_lower_the_peak() -> None:
    batch = toy_loader(rows=64).batch(0)
    found, peaks = [], []
    for recompute in (False, True):
        model = toy_model()
        model.checkpoint_activations = recompute
        for layer in model.layers:
            layer.dropout = 0.1  # type: ignore[assignment]
        torch.manual_seed(0)
        peaks.append(peak_bytes(partial(loss_and_gradients, model, CausalLM(), [batch])))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert same(*found)
    assert peaks[1] < 0.8 * peaks[0]


def test_dropout_leaves_out_its_share_in_training_alone(tmp_path: Path) -> None:
    model, batch = toy_model(), toy_loader().batch(0)
    whole = CausalLM().loss_sum(model.eval(), batch)[0]
    for layer in model.layers:
        layer.dropout = 0.5  # type: ignore[assignment]
    assert torch.equal(CausalLM().loss_sum(model.eval(), batch)[0], whole)
    model.train()
    ones = torch.ones(100_000)
    dropped = model.layers[0].drop(ones)  # type: ignore[operator]
    assert set(dropped.tolist()) == {0.0, 2.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    plain, _ = run(tmp_path / "plain", toy_config(steps=3))
    thinned, _ = run(tmp_path / "thinned", toy_config(steps=3, dropout=0.3))
    assert not same(weights(plain), weights(thinned))


@pytest.mark.peer  # drives the C++ compiler of the machine
def test_compiled_blocks_train_the_same(tmp_path: Path) -> None:
    """In a process of its own: what other tests have imported (distutils) can keep torch's compiler from starting."""
    assert finish(start(train_both_ways, tmp_path, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def train_both_ways(directory: Path) -> None:
    """Eager and compiled runs end with the same weights."""
    eager, _ = run(directory / "eager", toy_config(steps=3))
    compiled, _ = run(directory / "compiled", toy_config(steps=3, compile=True))
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value, atol=1e-4, rtol=1e-3)
    assert weights(compiled).keys() == weights(eager).keys()


def test_a_deep_model_of_ragged_batches_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives up in silence after so many graphs: neither depth nor lengths may reach that."""
    compile_plainly = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(Block, "compile", compile_plainly)
    torch._dynamo.reset()
    counters.clear()
    model = Transformer(replace(CONFIG, num_hidden_layers=6))
    model.initialise(0)
    prepare_model(model, toy_config(compile=True))
    with torch._dynamo.config.patch(recompile_limit=2):  # in the place of 8, to be quick
        for groups in (1, 2, 4):  # of segments of like length
            lengths = [2**power + 1 for power in range(1, groups + 1)]
            batch = PackedBatch.from_segments([(list(range(length)), None) for length in lengths])
            CausalLM().loss_sum(model, batch)[0].backward()
    assert not counters["unimplemented"]
    assert 2 < counters["frames"]["total"] == counters["frames"]["ok"] < 6, "graphs are of shapes, not of layers"


def test_some_checkpoints_stay_for_good(tmp_path: Path) -> None:
    run(tmp_path, toy_config(keep_checkpoints=1, keep_every=8))
    names = [path.name for path in checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000008", "step-00000016", "step-00000024", "step-00000030"]


def test_a_failed_background_write_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.train import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise GristmillError("disk full")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(GristmillError, match="disk full"):
        toy_run(tmp_path)
    assert not checkpoints(tmp_path / "checkpoints")


def test_out_of_memory_comes_with_advice(tmp_path: Path) -> None:
    def exhaust(call: int) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(GristmillError, match="micro_batches"):
        run(tmp_path, toy_config(), objective=Hooked(exhaust))

"""What goes wrong in long runs, and what must then be left: one case for each way."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gristmill.corpus.loader import ExampleLoader, PackedLoader
from gristmill.corpus.mixture import MixedLoader, Part
from gristmill.corpus.shards import TokenList
from gristmill.errors import CheckpointError, DataError, GristmillError
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import PackedBatch
from gristmill.train import checkpoint
from gristmill.train.callbacks import Callback, Run
from gristmill.train.checkpoint import checkpoints
from gristmill.train.loop import loss_and_gradients, train
from gristmill.train.metrics import read_metrics
from gristmill.train.optimisers.build import make_optimiser
from gristmill.train.world import model_tensors
from objectives import cases_encoder, cases_seq2seq
from train.toy import Hooked, same, toy_config, toy_loader, toy_model, toy_run, weights


class Halves:
    """Two terms: next tokens below 12, and the others."""

    weights: Mapping[str, float] = {"low": 1.0, "high": 2.0}

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> PackedBatch:
        return PackedBatch.from_segments(examples)

    def _part(self, batch: PackedBatch, name: str) -> PackedBatch:
        other = (batch.target_ids < 12) != (name == "low")
        targets = batch.target_ids.masked_fill(other, -100)
        return PackedBatch(batch.input_ids, targets, batch.position_ids, batch.segment_lengths)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {name: self._part(batch, name).target_count for name in self.weights}

    def loss_sums(self, model: torch.nn.Module, batch: PackedBatch) -> dict[str, Tensor]:
        return {name: CausalLM().loss_sum(model, self._part(batch, name))[0] for name in self.weights}


def test_a_term_may_lack_targets_in_a_batch_or_in_the_whole_step() -> None:
    low, high = PackedBatch.from_segments([([1, 2, 3, 4], None)]), PackedBatch.from_segments([([1, 20, 21], None)])
    alone = [loss_and_gradients(toy_model(), Halves(), [batch])["loss"] for batch in (low, high)]
    single = [loss_and_gradients(toy_model(), CausalLM(), [batch])["loss"] for batch in (low, high)]
    assert alone == pytest.approx([single[0], 2 * single[1]])
    both = loss_and_gradients(toy_model(), Halves(), [low, high])
    assert both == pytest.approx({"loss": sum(alone), "low": single[0], "high": single[1]})


class SpoiltData(Hooked):
    """Not finite on the data of the given batches, whenever they come."""

    def __init__(self, *numbers: int, hook: Any = lambda _: None) -> None:
        super().__init__(hook)
        self.bad = [toy_loader().batch(number).input_ids for number in numbers]

    def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
        total, count = super().loss_sum(model, batch)
        spoilt = model.training and any(torch.equal(batch.input_ids, ids) for ids in self.bad)
        return (total * math.nan if spoilt else total), count


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_batch_without_a_finite_loss_is_skipped_in_every_precision_and_resumed_over(
    tmp_path: Path, precision: str
) -> None:
    config = toy_config(steps=16, precision=precision, on_bad_step="skip", checkpoint_every=4)
    whole = toy_run(tmp_path / "whole", config, objective=SpoiltData(2, 7))  # 7: the step that writes a checkpoint
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [r["step"] for r in records if "not finite" in r.get("skipped", "")] == [3, 8]
    assert (tmp_path / "whole" / "bad_batches" / "step-00000008").is_dir()

    def crash(call: int) -> None:
        if call == 11:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        toy_run(tmp_path / "cut", config, objective=SpoiltData(2, 7, hook=crash))
    assert same(weights(toy_run(tmp_path / "cut", config, objective=SpoiltData(2, 7))), weights(whole))
    scalers = [checkpoints(tmp_path / name / "checkpoints")[-1] / "scaler.safetensors" for name in ("whole", "cut")]
    if precision == "float16":
        assert scalers[0].read_bytes() == scalers[1].read_bytes()


def test_a_run_killed_after_rewinding_twice_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = toy_config(on_bad_step="rewind", average=0.9, checkpoint_every=5)
    whole = toy_run(tmp_path / "whole", config, objective=SpoiltData(8, 12))

    def kill(call: int) -> None:
        if call == 15:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        toy_run(tmp_path / "cut", config, objective=SpoiltData(8, 12, hook=kill))
    assert same(weights(toy_run(tmp_path / "cut", config, objective=SpoiltData(8, 12))), weights(whole))
    for name in ("whole", "cut"):
        assert [r["step"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize(
    ("before", "after", "lacks"),
    [
        ({}, {"average": 0.9}, "needs average, model, optimiser"),
        ({"average": 0.9}, {}, "holds average, model, optimiser"),
        ({}, {"precision": "float16"}, "needs model, optimiser, scaler"),
    ],
    ids=["average-on", "average-off", "float16"],
)
def test_a_checkpoint_that_holds_more_or_less_than_the_run_is_refused_by_name(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], lacks: str
) -> None:
    toy_run(tmp_path, toy_config(steps=4, **before))
    with pytest.raises(CheckpointError, match=lacks):
        toy_run(tmp_path, toy_config(steps=8, **after))


def test_a_damaged_checkpoint_never_outlives_a_whole_one(tmp_path: Path) -> None:
    """The newest is damaged; a run that goes on from the one before and is stopped at once must be able to go on."""
    whole = toy_run(tmp_path / "whole", toy_config(steps=8, checkpoint_every=4))
    toy_run(tmp_path / "run", toy_config(steps=8, checkpoint_every=4))
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    config = toy_config(steps=8, checkpoint_every=4, keep_checkpoints=1)
    stop = Hooked(lambda call: os.kill(os.getpid(), signal.SIGINT) if call == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path / "run", config, objective=stop)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000006"]
    assert same(weights(toy_run(tmp_path / "run", config)), weights(whole))


def test_a_disk_that_fills_up_behind_the_back_ends_the_run_at_once_and_keeps_what_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls, seen = checkpoint.write_json, [0], [0]

    def full(path: Path, value: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, value)

    class Slow(Callback):
        def after_step(self, run: Run) -> None:
            seen[0] = run.position.step

        def before_step(self, run: Run) -> None:
            for thread in [] if run.position.step < 20 else checkpoint.threading.enumerate():
                if thread is not checkpoint.threading.main_thread() and not thread.daemon:
                    thread.join()

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(GristmillError, match=r"step-00000020: could not be written \(No space left"):
        train(toy_model(), CausalLM(), toy_loader(), toy_config(checkpoint_every=10), tmp_path, callbacks=[Slow()])
    assert seen[0] <= 21, "not at the checkpoint of step 30"
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000010"]
    monkeypatch.setattr(checkpoint, "write_json", original)
    resumed = toy_model()
    train(resumed, CausalLM(), toy_loader(), toy_config(checkpoint_every=10), tmp_path)
    assert same(weights(resumed), weights(toy_run(tmp_path / "whole", toy_config(checkpoint_every=10))))


@pytest.mark.parametrize("where", ["backward", "optimiser"])
def test_memory_that_runs_out_on_the_cpu_comes_with_advice(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: Any) -> None:
        torch.empty(10**14)

    if where == "optimiser":
        kind = type(make_optimiser(toy_model(), "adamw", learning_rate=1.0))
        monkeypatch.setattr(kind, "step", exhaust)
    with pytest.raises(GristmillError, match=r"can't allocate memory(.|\n)*micro_batches"):
        toy_run(tmp_path, objective=Hooked(exhaust if where == "backward" else lambda _: None))


def test_tokens_without_a_row_in_the_embedding_are_refused_before_the_first_step(tmp_path: Path) -> None:
    source = TokenList([(np.arange(10), None)] * 4, vocab_size=64)
    loaders = (
        PackedLoader(source, row_length=32, rows_per_batch=1, seed=0),
        MixedLoader([Part("a", source, 1.0)], row_length=32, rows_per_batch=1, seed=0),
    )
    for loader in loaders:
        with pytest.raises(DataError, match=r"vocabulary of 64.*24 rows"):
            train(toy_model(), CausalLM(), loader, toy_config(), tmp_path)
        with pytest.raises(DataError, match=r"vocabulary of 64.*24 rows"):
            train(toy_model(), CausalLM(), toy_loader(), toy_config(), tmp_path, validation=loader)
    assert not (tmp_path / "metrics.jsonl").exists()


class AtStep(Callback):
    """Calls something after a step."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def after_step(self, run: Run) -> None:
        if run.position.step == self.step:
            self.what(run)


def test_the_step_at_which_a_callback_stops_the_run_is_validated_and_kept(tmp_path: Path) -> None:
    stop = AtStep(9, lambda run: run.stop("enough"))
    train(toy_model(), CausalLM(), toy_loader(), toy_config(), tmp_path, validation=toy_loader(8), callbacks=[stop])
    assert "validation_loss" in read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000009"


def test_a_figure_that_is_not_finite_is_refused_by_name_and_cuts_no_line(tmp_path: Path) -> None:
    spoil = AtStep(3, lambda run: run.record.update(mine=math.nan))
    with pytest.raises(GristmillError, match=r"record of step 3 .*'mine': nan"):
        train(toy_model(), CausalLM(), toy_loader(), toy_config(), tmp_path, callbacks=[spoil])
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_a_kill_left_beside_the_best_weights_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "best" / ".step-00000004.123.0123abcd.tmp"
    left.mkdir(parents=True)
    toy_run(tmp_path, toy_config(steps=1))
    assert not left.exists()


def test_accumulation_equals_one_large_batch() -> None:
    loader = toy_loader(mask=True)
    parts = [loader.batch(number) for number in range(4)]
    fields = [torch.cat([getattr(part, n) for part in parts]) for n in ("input_ids", "target_ids", "position_ids")]
    large = PackedBatch(*fields, sum((part.segment_lengths for part in parts), ()))
    found = []
    for batches in (parts, [large]):
        model = toy_model()
        loss = loss_and_gradients(model, CausalLM(), batches)["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert float((found[0][1] - found[1][1]).abs().max()) < 1e-6


KINDS = {case.name: case for case in [*cases_encoder.cases(), *cases_seq2seq.cases()]}


@pytest.mark.parametrize("name", ["bert", "replaced tokens", "span corruption", "multi-token"])
def test_models_of_several_parts_and_terms_resume_bit_for_bit(tmp_path: Path, name: str) -> None:
    case = KINDS[name]
    config = toy_config(steps=8, checkpoint_every=3, micro_batches=2, dropout=0.1, average=0.9)

    def kill(run: Run) -> None:
        raise RuntimeError("killed")

    def trained(directory: Path, *callbacks: Callback) -> dict[str, Tensor]:
        model, prepare = case.model(), case.objective.prepare
        loader = ExampleLoader([case.example(n) for n in range(9)], examples_per_batch=2, seed=1, prepare=prepare)
        train(model, case.objective, loader, config, directory, callbacks=callbacks, validation=loader)
        return model_tensors(model)

    whole = trained(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "cut", AtStep(5, kill))
    assert same(trained(tmp_path / "cut"), whole)

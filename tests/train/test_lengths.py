"""Short sequences first, long ones later."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.errors import GristmillError
from gristmill.model.config import PositionConfig
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.batch import IGNORED, PackedBatch
from gristmill.train.lengths import BERT, LengthSchedule, ScheduledLoader, cut_to_length
from gristmill.train.loop import train
from train import toy

SHORT, LONG = 8, 32


class Sequences:
    """Batches of `LONG`-token sequences; 256 tokens each, in which a token follows from the one before it."""

    batches_per_epoch = 1000

    def batch(self, step: int) -> PackedBatch:
        starts = torch.randint(toy.VOCABULARY, (8, 1), generator=torch.Generator().manual_seed(step))
        ids = (starts + 5 * torch.arange(LONG)) % toy.VOCABULARY
        return PackedBatch.from_segments([(row.numpy(), None) for row in ids])


def learned_model() -> Transformer:
    model = Transformer(replace(toy.CONFIG, positions=PositionConfig(absolute="learned"), max_position_embeddings=LONG))
    model.initialise(0)
    return model


def test_lengths_by_step() -> None:
    assert [BERT.at(step, 10) for step in range(10)] == [128] * 9 + [512]
    lengths = [BERT.at(step, 1_000_000) for step in (0, 899_999, 900_000, 999_999)]
    assert lengths == [128, 128, 512, 512]
    three = LengthSchedule(((0.5, 4), (0.3, 8), (0.2, 16)))
    assert [three.at(step, 10) for step in range(10)] == [4] * 5 + [8] * 3 + [16] * 2


@given(shares=st.lists(st.integers(1, 100), min_size=1, max_size=5), steps=st.integers(500, 5000))
def test_stages_leave_no_gap_and_have_their_share(shares: list[int], steps: int) -> None:
    total = sum(shares)
    schedule = LengthSchedule(tuple((share / total, 2 + number) for number, share in enumerate(shares)))
    stages = schedule.over(steps)
    assert [stage.first for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert stages[-1].end == steps
    for stage, share in zip(stages, shares, strict=True):
        assert abs((stage.end - stage.first) - steps * share / total) <= 1
        assert schedule.at(stage.first, steps) == schedule.at(stage.end - 1, steps) == stage.length


def test_refusals() -> None:
    for stages, message in (
        ((), "add up to 1"),
        (((0.9, 128),), "add up to 1, got 0.9"),
        (((0.0, 128), (1.0, 512)), r"stages\[0\]: the share"),
        (((0.9, 128), (0.1, 1)), r"stages\[1\]: the length"),
    ):
        with pytest.raises(GristmillError, match=message):
            LengthSchedule(stages)
    with pytest.raises(GristmillError, match=r"stages\[1\].*has no step"):
        ScheduledLoader(Sequences(), BERT, steps=2)
    for step in (-1, 10):
        with pytest.raises(GristmillError, match="outside a run of 10 steps"):
            BERT.at(step, 10)
    with pytest.raises(GristmillError, match="at least 2 tokens"):
        cut_to_length(Sequences().batch(0), 1)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), length=st.integers(2, 45))
def test_cutting_keeps_every_token_and_all_targets_within_pieces(lengths: list[int], length: int) -> None:
    documents = [[10 * number + index % 10 for index in range(size)] for number, size in enumerate(lengths)]
    batch = PackedBatch.from_segments([(ids, None) for ids in documents])
    pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    expected, cut = PackedBatch.from_segments([(ids, None) for ids in pieces]), cut_to_length(batch, length)
    assert cut.segment_lengths == expected.segment_lengths
    for name in ("input_ids", "target_ids", "position_ids"):
        assert torch.equal(getattr(cut, name), getattr(expected, name)), name
    assert (cut is batch) == (max(lengths) <= length)


def test_masked_targets_stay_masked() -> None:
    batch = PackedBatch.from_segments([(list(range(10)), [0, 0, 1, 1, 1, 0, 1, 1, 0, 1])])
    assert cut_to_length(batch, 4).target_ids.tolist() == [
        *(IGNORED, 2, 3, IGNORED),
        *(IGNORED, 6, 7, IGNORED),
        *(9, IGNORED),
    ]


def test_only_short_positions_learn_in_the_first_stage() -> None:
    loader = ScheduledLoader(Sequences(), LengthSchedule(((0.5, SHORT), (0.5, LONG))), steps=4)
    for step, reach in ((0, SHORT), (1, SHORT), (2, LONG), (3, LONG)):
        model = learned_model()
        CausalLM().loss_sum(model, loader.batch(step))[0].backward()
        gradient = model.embed_positions.weight.grad
        assert gradient is not None
        rows = gradient.abs().sum(1)
        assert bool((rows[: reach - 1] > 0).all()), f"step {step}"  # the last token of a sequence predicts nothing
        assert bool((rows[reach:] == 0).all()), f"step {step}"


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_counts_as_many_tokens_in_every_step_and_only_sequences_change(
    micro_batches: int, tmp_path: Path
) -> None:
    steps, seen = 4, []

    class Watched(CausalLM):
        def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, int]:
            seen.append((len(batch.input_ids), batch.segment_lengths))
            return super().loss_sum(model, batch)

    schedule = LengthSchedule(((0.75, SHORT), (0.25, LONG)))
    loader = ScheduledLoader(Sequences(), schedule, steps=steps, micro_batches=micro_batches)
    config = toy.toy_config(steps=steps, micro_batches=micro_batches)
    position = train(learned_model(), Watched(), loader, config, tmp_path)
    assert position.tokens == steps * micro_batches * 8 * LONG
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [step * micro_batches * 8 * LONG for step in range(1, steps + 1)]
    short, long = (8 * LONG, (SHORT,) * (8 * LONG // SHORT)), (8 * LONG, (LONG,) * 8)
    assert seen == [short] * 3 * micro_batches + [long] * micro_batches


def test_the_loss_on_short_inputs_goes_on_where_it_was(tmp_path: Path) -> None:
    """The first steps at full length change what the model makes of short inputs no more than steps before did."""
    steps, switch = 40, 30
    loader = ScheduledLoader(Sequences(), LengthSchedule(((0.75, SHORT), (0.25, LONG))), steps=steps)
    held_out = cut_to_length(Sequences().batch(999), SHORT)
    losses: list[float] = []

    class Watched(CausalLM):
        def loss_sum(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, int]:
            with torch.no_grad():
                total, count = super().loss_sum(model, held_out)
            losses.append(float(total) / count)
            return super().loss_sum(model, batch)

    train(learned_model(), Watched(), loader, toy.toy_config(steps=steps, learning_rate=3e-2), tmp_path)
    assert losses[0] > 3.0
    assert losses[switch] < 0.5 * losses[0]  # something had been learned by then
    jumps = [after - before for before, after in pairwise(losses)]
    usual = max(abs(jump) for jump in jumps[:switch])
    assert all(abs(jump) <= usual for jump in jumps[switch : switch + 5]), (usual, jumps[switch:])
    assert losses[-1] < losses[switch] + 0.1


def test_batches_of_another_kind_are_refused_by_name() -> None:
    class Pairs:
        batches_per_epoch = 10

        def batch(self, number: int) -> object:
            return SimpleNamespace(tokens=3)

    loader = ScheduledLoader(Pairs(), LengthSchedule(((1.0, 8),)), steps=10)
    with pytest.raises(GristmillError, match="cuts packed batches, but this objective makes a SimpleNamespace"):
        loader.batch(0)

"""Supervised pretraining, a new head, and what passes from one language to another."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import pytest
import torch

from gristmill.errors import DataError
from gristmill.model.encoder import Encoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.train.transfer import accuracy, fit, transfer
from programs import program

EXAMPLE = program("transfer")
LINGUAL = program("cross_lingual")
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def sources() -> list[Headed]:
    return [EXAMPLE.pretrain(seed) for seed in SEEDS]


def test_the_body_is_the_source_bit_for_bit_and_the_head_is_new(sources: list[Headed]) -> None:
    head = HeadConfig(kind="sequence_classifier", labels=("a", "b", "c"))
    before = {name: tensor.clone() for name, tensor in sources[0].state_dict().items()}
    target, other = transfer(sources[0], head, seed=5), transfer(sources[0], head, seed=6)
    body = sources[0].body.state_dict()
    assert target.body.state_dict().keys() == body.keys()
    assert all(torch.equal(tensor, body[name]) for name, tensor in target.body.state_dict().items())
    assert target(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 3)
    weight = target.head.get_parameter("out.weight")
    assert weight.shape == (3, EXAMPLE.CONFIG.hidden_size)
    assert not torch.equal(weight, other.head.get_parameter("out.weight"))
    assert float(weight.detach().std()) == pytest.approx(EXAMPLE.CONFIG.initializer_range, rel=0.3)
    assert not target.head.get_parameter("out.bias").any()
    # what the target learns does not reach the source
    task = EXAMPLE.subjectivity(16, torch.Generator().manual_seed(0))
    fit(target, task.input_ids, task.labels, steps=2)
    assert not torch.equal(target.body.embed_tokens.weight, sources[0].body.embed_tokens.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sources[0].state_dict().items())


def test_a_tied_head_does_not_redraw_the_body(sources: list[Headed]) -> None:
    target = transfer(sources[0], HeadConfig(kind="masked_lm", dense="gelu"), seed=0)
    assert torch.equal(target.body.embed_tokens.weight, sources[0].body.embed_tokens.weight)
    assert target.head.get_parameter("decoder.weight") is target.body.embed_tokens.weight


@pytest.mark.parametrize("labels", [16, 32])
def test_transfer_is_no_worse_than_from_scratch_on_few_labels(sources: list[Headed], labels: int) -> None:
    pairs = [EXAMPLE.compare(source, seed, labels) for seed, source in zip(SEEDS, sources, strict=True)]
    assert statistics.fmean(moved - scratch for scratch, moved in pairs) > 0.03


def test_bad_training_sets_are_refused() -> None:
    model = Headed(Encoder(EXAMPLE.CONFIG), EXAMPLE.SENTIMENT)
    for rows, labels in ((0, 0), (2, 3)):
        with pytest.raises(DataError, match="label for each"):
            fit(model, torch.zeros(rows, 3, dtype=torch.long), torch.zeros(labels, dtype=torch.long), steps=1)


def test_accuracy_counts_what_is_right() -> None:
    assert accuracy(lambda ids: torch.eye(3)[ids], torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75


def test_a_second_language_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy on the second language is above chance, and above that of a control pretrained on the first alone."""
    labelled: list[torch.Tensor] = []

    def recorded(model: Any, input_ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> list[float]:
        labelled.append(input_ids)
        return fit(model, input_ids, labels, **options)

    monkeypatch.setattr(LINGUAL, "fit", recorded)
    found = {}
    for languages in ((LINGUAL.FIRST, LINGUAL.SECOND), (LINGUAL.FIRST,)):
        for seed in (0, 1):
            model = LINGUAL.fine_tune(LINGUAL.pretrain(languages, seed, steps=150), seed)
            found[len(languages), seed] = LINGUAL.evaluate(model, seed)
    assert len(labelled) == 4
    assert all(bool((ids < LINGUAL.SECOND).all()) for ids in labelled)  # zero labels of the second language
    assert all(first > 0.9 for first, _ in found.values())
    chance = 1 / LINGUAL.TOPICS
    both, control = (statistics.fmean(found[count, seed][1] for seed in (0, 1)) for count in (2, 1))
    assert both > chance + 0.15
    assert both > control + 0.15


def test_the_examples_print_their_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(EXAMPLE, "LABELS", (16,))
    for example in (EXAMPLE, LINGUAL):
        monkeypatch.setattr(example, "SEEDS", (3,))
        for name in ("pretrain", "compare", "fine_tune"):
            if hasattr(example, name):
                monkeypatch.setattr(example, name, partial(getattr(example, name), steps=1))
    EXAMPLE.main()
    LINGUAL.main()
    out = capsys.readouterr().out
    assert "| 16 | " in out
    assert "| the first alone | 3 | " in out

"""Greedy layer-wise pretraining: each layer learns to rebuild its input, and a classifier gains from it."""

from __future__ import annotations

import copy
import itertools
import statistics

import pytest
import torch
from torch import nn

from gristmill.errors import DataError
from gristmill.train.layerwise import pretrain_layers, reconstruction_loss_sum
from programs import program

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def compared() -> list[tuple[float, float, list[list[float]]]]:
    compare = program("layerwise").compare
    return [compare(seed) for seed in SEEDS]


def test_reconstruction_of_every_layer_falls_monotonically(
    compared: list[tuple[float, float, list[list[float]]]],
) -> None:
    """The mean over seeds, epoch by epoch."""
    for layer in range(3):
        curves = [history[layer] for _, _, history in compared]
        mean = [statistics.fmean(losses) for losses in zip(*curves, strict=True)]
        assert len(mean) == 20
        assert all(later < earlier for earlier, later in itertools.pairwise(mean))
        assert mean[-1] < 0.95 * mean[0]


def test_pretrained_layers_beat_a_random_start_on_the_same_labels(
    compared: list[tuple[float, float, list[list[float]]]],
) -> None:
    """The same labels, first weights and steps; of 4 classes."""
    assert all(plain > 0.3 for plain, _, _ in compared)
    gain = statistics.fmean(pretrained - plain for plain, pretrained, _ in compared)
    assert gain > 0.05


def test_the_loss_is_the_cross_entropy_of_the_rebuilt_input() -> None:
    torch.manual_seed(0)
    layer, bias, x = nn.Linear(4, 3), torch.randn(4), torch.rand(2, 4)
    rebuilt = torch.sigmoid(torch.sigmoid(x @ layer.weight.T + layer.bias) @ layer.weight + bias)
    expected = -(x * rebuilt.log() + (1 - x) * (1 - rebuilt).log()).sum()
    torch.testing.assert_close(reconstruction_loss_sum(layer, bias, x, x), expected)


def test_a_layer_reads_what_the_trained_one_below_gives() -> None:
    """Pretraining two layers is pretraining one, and then the other on its codes."""
    inputs = (torch.rand(64, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    torch.manual_seed(0)
    together = [nn.Linear(6, 5), nn.Linear(5, 4)]
    lower, upper = copy.deepcopy(together)
    first = pretrain_layers([lower], inputs, epochs=3, corruption=0.2)
    second = pretrain_layers([upper], torch.sigmoid(lower(inputs)).detach(), epochs=3, corruption=0.2)
    assert pretrain_layers(together, inputs, epochs=3, corruption=0.2) == first + second
    assert torch.equal(lower.weight, together[0].weight)
    assert torch.equal(upper.weight, together[1].weight)


def test_inputs_that_are_no_probabilities_are_refused() -> None:
    for inputs, told in (
        (torch.full((3, 4), 2.0), r"\[0, 1\]"),
        (torch.rand(3, 5), "samples, 4"),
        (torch.ones(0, 4), "one"),
    ):
        with pytest.raises(DataError, match=told):
            pretrain_layers([nn.Linear(4, 2)], inputs)


def test_the_example_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = program("layerwise")
    monkeypatch.setattr(example, "SEEDS", (7,))
    monkeypatch.setattr(example, "compare", lambda seed: (0.5, 0.75, [[2.0, 1.0]]))
    example.main()
    assert "| 7 | 50.0% | 75.0% | 2.0 to 1.0 |" in capsys.readouterr().out

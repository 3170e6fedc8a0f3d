"""Self-training: what a classifier is sure of teaches it more, and true labels stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import DataError, RequestError
from gristmill.train.self_training import Predict, pseudo_labels, self_train
from programs import program

EXAMPLE = program("self_training")


def nearest_mean(inputs: Tensor, labels: Tensor) -> Predict:
    means = torch.stack([inputs[labels == label].mean(dim=0) for label in range(2)])
    return lambda x: (-torch.cdist(x, means)).softmax(dim=1)


def points(seed: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Two strips that a straight line separates; the first two points are one end of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    x = (
        torch.rand(count, 2, generator=generator) * torch.tensor([6.0, 1.0])
        + torch.tensor([0.0, 3.0]) * labels[:, None]
    )
    return x, labels


def test_accuracy_does_not_fall_over_the_rounds_of_a_separable_task() -> None:
    for seed in range(10):
        _, found = EXAMPLE.run(seed)
        assert len(found) > 3
        assert all(later >= earlier for earlier, later in itertools.pairwise(found))
        assert found[-1] > found[0] + 0.2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0.5, 0.99), st.integers(0, 5))
def test_true_labels_are_in_every_training_set_as_they_are(seed: int, threshold: float, rounds: int) -> None:
    x, labels = points(seed)
    known, given_labels = x[:6], 1 - labels[:6]  # wrong on purpose: nothing may mend them
    kept = given_labels.clone()
    sets: list[tuple[Tensor, Tensor]] = []

    def fit(inputs: Tensor, targets: Tensor) -> Predict:
        sets.append((inputs, targets))
        return nearest_mean(inputs, targets)

    history = self_train(fit, known, given_labels, x[6:], threshold=threshold, rounds=rounds)
    assert torch.equal(given_labels, kept)
    assert len(sets) == len(history) <= rounds + 1
    for inputs, targets in sets:
        assert torch.equal(inputs[:6], known)
        assert torch.equal(targets[:6], kept)
    for (inputs, targets), before in zip(sets[1:], history, strict=False):
        assert torch.equal(inputs[6:], x[6:][before.indices])
        assert torch.equal(targets[6:], before.labels)


@given(st.integers(0, 99), st.floats(0.5, 0.99))
def test_pseudo_labels_follow_from_model_and_threshold(seed: int, threshold: float) -> None:
    x, labels = points(seed)
    first, again = (self_train(nearest_mean, x[:4], labels[:4], x[4:], threshold=threshold) for _ in range(2))
    assert len(first) == len(again)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        indices, found = pseudo_labels(one.predict(x[4:]), threshold)
        assert torch.equal(indices, one.indices)
        assert torch.equal(found, one.labels)


def test_pseudo_labels_are_those_that_reach_the_threshold() -> None:
    indices, labels = pseudo_labels(torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.95, 0.05], [0.2, 0.8]]), 0.9)
    assert (indices.tolist(), labels.tolist()) == ([1, 2], [1, 0])


def test_without_unlabelled_samples_it_is_the_supervised_model() -> None:
    x, labels = points(0)
    history = self_train(nearest_mean, x[:6], labels[:6], x[:0])
    assert len(history) == 1
    assert len(history[0].indices) == 0
    assert torch.equal(history[0].predict(x), nearest_mean(x[:6], labels[:6])(x))


def test_bad_input_is_refused() -> None:
    x, labels = points(0)
    with pytest.raises(DataError, match="starts from labelled"):
        self_train(nearest_mean, x[:0], labels[:0], x)
    with pytest.raises(RequestError, match="threshold"):
        self_train(nearest_mean, x[:4], labels[:4], x, threshold=0.0)
    with pytest.raises(RequestError, match="rounds"):
        self_train(nearest_mean, x[:4], labels[:4], x, rounds=-1)


def test_the_example_prints_its_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    EXAMPLE.main()
    assert "| 0 | " in capsys.readouterr().out

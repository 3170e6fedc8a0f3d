"""Self-training: a classifier labels what has no label, and learns from what it is sure of.

Source: Yarowsky 1995; unlike self-supervised pretraining it needs a first classifier, from a few true labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.errors import DataError, RequestError

Predict = Callable[[Tensor], Tensor]
"""Probabilities (samples, classes) of inputs (samples, ...)."""
Fit = Callable[[Tensor, Tensor], Predict]
"""Trains a new classifier on inputs (samples, ...) and labels (samples,), int64."""


@dataclass(frozen=True, eq=False)
class Round:
    """One round: the classifier that was trained, the unlabelled samples it was sure of, and their labels.

    `indices` (sure,) ascend; `labels` (sure,) are for the next round's training."""

    predict: Predict
    indices: Tensor
    labels: Tensor


def pseudo_labels(probabilities: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Indices of the rows of `probabilities` (samples, classes) whose greatest reaches `threshold`, and its class."""
    sure, labels = probabilities.max(dim=1)
    indices = (sure >= threshold).nonzero().squeeze(1)
    return indices, labels[indices]


def self_train(
    fit: Fit, inputs: Tensor, labels: Tensor, unlabelled: Tensor, *, threshold: float = 0.9, rounds: int = 10
) -> list[Round]:
    """Train on `inputs` (samples, ...) with their `labels` (samples,), then again and again with pseudo-labels for
    `unlabelled` (others, ...) as well. The last round's `predict` is the result.

    True labels come first in every training set and never change. Pseudo-labels are made anew each round, so that one
    may change or be withdrawn. Ends after `rounds` retrainings, or when the pseudo-labels are those of the round
    before. Without unlabelled samples it is supervised training.
    Raises DataError without a labelled sample, RequestError for a threshold outside (0, 1] or negative rounds.
    """
    if len(inputs) == 0 or labels.shape != (len(inputs),):
        raise DataError(f"self-training starts from labelled samples: got {len(inputs)}, labels {tuple(labels.shape)}")
    if not 0 < threshold <= 1:
        raise RequestError(f"threshold must be in (0, 1], got {threshold}", field="threshold")
    if rounds < 0:
        raise RequestError(f"rounds must be 0 or more, got {rounds}", field="rounds")
    history: list[Round] = []
    indices, pseudo = labels.new_empty(0), labels.new_empty(0)
    for _ in range(rounds + 1):
        predict = fit(torch.cat((inputs, unlabelled[indices])), torch.cat((labels, pseudo)))
        before = indices, pseudo
        if len(unlabelled):
            indices, pseudo = pseudo_labels(predict(unlabelled), threshold)
        history.append(Round(predict, indices, pseudo))
        if torch.equal(indices, before[0]) and torch.equal(pseudo, before[1]):
            break
    return history

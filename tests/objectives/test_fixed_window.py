"""Prediction from a fixed window keeps the contract of the training loop."""

from __future__ import annotations

import math

import pytest
import torch

from conformance.objective import ObjectiveCase, ObjectiveSuite, numbers
from gristmill.model.feedforward_lm import FeedForwardLM
from gristmill.objectives.fixed_window import FixedWindowLM


def _model() -> FeedForwardLM:
    torch.manual_seed(0)
    return FeedForwardLM(20, order=3, size=8, hidden=16)


@pytest.mark.parametrize(
    "case",
    [
        ObjectiveCase(
            name="fixed window",
            objective=FixedWindowLM(),
            model=_model,
            example=lambda number: (numbers(number, (4, 12), 20), None),
            bad={"no tokens": ([], None), "a mask of another length": ([1, 2], [1])},
            uniform={"loss": math.log(20)},
            random=False,
        )
    ],
    ids=str,
)
class TestFixedWindow(ObjectiveSuite):
    """The suite."""

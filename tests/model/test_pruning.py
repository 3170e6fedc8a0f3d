"""Pruning by magnitude."""

from __future__ import annotations

import pytest
import torch

from gristmill.errors import RequestError
from gristmill.model.pruning import prune_linears
from model import tiny


def test_pruning_nothing_is_the_identity_and_bit_for_bit() -> None:
    model, ids = tiny.model(), tiny.ids(20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(ids)
    assert prune_linears(model, 0.0) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids), logits)


def test_the_smallest_go_and_the_head_and_the_rest_stay() -> None:
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count = prune_linears(model, 0.3)
    zeros = 0
    for name, tensor in model.state_dict().items():
        if "_proj" not in name:
            assert torch.equal(tensor, before[name])
            continue
        gone = tensor == 0
        zeros += int(gone.sum())
        assert int(gone.sum()) == int(0.3 * tensor.numel())
        assert torch.equal(tensor[~gone], before[name][~gone])
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
    assert count == zeros > 0
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(RequestError, match="share must be"):
            prune_linears(model, share)

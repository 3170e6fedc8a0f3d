"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gristmill.errors import CheckpointError, GristmillError
from gristmill.train.ema import WeightAverage


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(dtype)


def move(module: nn.Module, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw).to(weight.dtype))


def weights(module: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(st.floats(0, 0.999))
def test_equals_torch(decay: float) -> None:
    net = model()
    average = WeightAverage(net, decay)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(net)  # its first update copies: the average begins at the first weights
    for number in range(4):
        move(net, number)
        average.update(net)
        theirs.update_parameters(net)
    assert same(list(average.tensors().values()), weights(theirs.module))


def test_the_average_is_float32_whatever_the_weights_are() -> None:
    """Steps of a thousandth are lost in bfloat16 and kept in the average."""
    net = model(torch.bfloat16)
    average = WeightAverage(net, 0.999)
    before = {name: value.clone() for name, value in average.tensors().items()}
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(1.0)
    average.update(net)
    for (name, weight), value in zip(net.named_parameters(), average.tensors().values(), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, before[name] + 0.001 * (weight.float() - before[name]))
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_in_and_back_even_after_an_error(dtype: torch.dtype) -> None:
    net = model(dtype)
    average = WeightAverage(net, 0.5)
    move(net, 1)
    average.update(net)
    own, places = weights(net), [weight.data_ptr() for weight in net.parameters()]
    try:
        with average.swapped_in(net):
            assert same(weights(net), [value.to(dtype) for value in average.tensors().values()])
            assert not same(weights(net), own)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert same(weights(net), own)
    assert [weight.data_ptr() for weight in net.parameters()] == places  # the optimiser holds these very tensors
    average.copy_to(net)
    assert same(weights(net), [value.to(dtype) for value in average.tensors().values()])


def test_goes_on_from_its_tensors() -> None:
    net = model()
    average = WeightAverage(net, 0.9)
    move(net, 1)
    average.update(net)
    saved = {name: value.clone() for name, value in average.tensors().items()}
    fresh = WeightAverage(net, 0.9)
    fresh.load_tensors(saved)
    move(net, 2)
    average.update(net)
    fresh.update(net)
    assert same(list(fresh.tensors().values()), list(average.tensors().values()))


def test_what_does_not_fit_is_refused() -> None:
    average = WeightAverage(model(), 0.9)
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        average.load_tensors({name: t for name, t in average.tensors().items() if name != "0.bias"})
    with pytest.raises(CheckpointError, match=r"1\.weight"):
        average.load_tensors(average.tensors() | {"1.weight": torch.zeros(2)})
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(GristmillError, match=r"\[0, 1\)"):
            WeightAverage(model(), decay)

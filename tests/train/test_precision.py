"""Numbers of 16 bits, what they lose, and how a step is kept whole nevertheless."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gristmill.errors import CheckpointError, GristmillError
from gristmill.train.optimisers import make_optimiser, optimiser_tensors
from gristmill.train.optimisers.state import load_optimiser_tensors
from gristmill.train.precision import Precision, PrecisionName

MODES = list(get_args(PrecisionName))


class One(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def half(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float16)


def test_float16_overflows_and_flushes() -> None:
    assert math.isinf(half(65504) * 2)
    assert half(1e-8) == 0


def test_addition_is_not_associative() -> None:
    assert (half(2048) + half(1)) + half(1) == 2048
    assert half(2048) + (half(1) + half(1)) == 2050
    total = torch.tensor(2048.0) + half(1).float() + half(1).float()  # accumulated in float32 the order is free
    assert total == 2050


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_small_updates_arrive(mode: Any) -> None:
    """1e-4 added to a weight of 1, 10,000 times over, gives about 2 in every mode that is offered."""
    model, precision = One(), Precision(mode, "cpu")
    precision.prepare(model)
    optimiser = make_optimiser(model, "sgd", learning_rate=1e-4, weight_decay=0.0)
    for _ in range(10_000):
        with precision.forward("cpu"):
            loss = -model.weight.sum()
        precision.scale(loss).backward()
        precision.unscale(optimiser)
        assert precision.step(optimiser)
        optimiser.zero_grad()
    assert model.weight.item() == pytest.approx(2.0, rel=0.005)  # 0.004 is one step of bfloat16


def test_ten_thousand_small_updates_are_lost_in_float16_alone() -> None:
    weight, master = half(1.0), torch.tensor(1.0)
    for _ in range(10_000):
        weight, master = weight + half(1e-4), master + 1e-4
    assert weight == 1.0
    assert master == pytest.approx(2.0, rel=1e-3)


class Net(nn.Module):
    """A classifier of eight features."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(16, 8, generator=draw) * 0.3)
        self.second = nn.Parameter(torch.randn(4, 16, generator=draw) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x.to(self.first.dtype), self.first).relu()
        return nn.functional.cross_entropy(nn.functional.linear(hidden, self.second).float(), x[:, :4].argmax(dim=1))


def train(model: Net, optimiser: torch.optim.Optimizer, precision: Precision, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        with precision.forward("cpu"):
            loss = model(x)
        precision.scale(loss).backward()
        precision.unscale(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        precision.step(optimiser)
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def made(mode: Any, **scaling: Any) -> tuple[Net, torch.optim.Optimizer, Precision]:
    model, precision = Net(), Precision(mode, "cpu", **scaling)
    precision.prepare(model)
    return model, make_optimiser(model, "adamw", learning_rate=1e-2), precision


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_as_float32_does(mode: Any) -> None:
    reference, losses = (train(*made(kind), range(40)) for kind in ("float32", mode))
    assert losses[-1] < 0.75 * losses[0]
    assert losses == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_goes_on_bit_for_bit(mode: Any) -> None:
    model, optimiser, precision = made(mode, growth_every=3, initial_scale=8.0)
    train(model, optimiser, precision, range(8))
    other, fresh, again = made(mode, growth_every=3, initial_scale=8.0)
    other.load_state_dict(model.state_dict())
    load_optimiser_tensors(other, fresh, optimiser_tensors(model, optimiser))
    again.load_tensors(precision.tensors())
    assert train(model, optimiser, precision, range(8, 14)) == train(other, fresh, again, range(8, 14))
    assert torch.equal(model.first, other.first)
    assert precision.tensors() == again.tensors()


def test_what_is_computed_in_what() -> None:
    for mode, inside, kept in [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("float16", torch.float16, torch.float32),
        ("pure_bfloat16", torch.bfloat16, torch.bfloat16),
    ]:
        model, _, precision = made(mode)
        with precision.forward("cpu"):
            assert (model.first @ model.first.T).dtype == inside
        assert model.first.dtype == kept


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.5, math.inf, math.nan]), min_size=1, max_size=25))
def test_decides_as_torch_and_as_the_rule_says(gradients: list[float]) -> None:
    """Skip and halve on inf or NaN; double after three good steps in a row."""
    model, plain = One(), nn.Parameter(torch.ones(1))
    precision = Precision("float16", "cpu", initial_scale=1024.0, growth_every=3)
    optimiser = make_optimiser(model, "adamw", learning_rate=0.1)
    torchs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    other = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    scale, good = 1024.0, 0
    for gradient in gradients:
        precision.scale((model.weight * gradient).sum()).backward()
        precision.unscale(optimiser)
        assert model.weight.grad is not None
        assert precision.expects(1.0, model.weight.grad.item()) == (not math.isfinite(gradient))
        assert not precision.expects(math.nan, math.nan), "no loss scale mends a loss"
        before = model.weight.item()
        assert precision.step(optimiser) == math.isfinite(gradient)
        assert (model.weight.item() != before) == math.isfinite(gradient)
        optimiser.zero_grad()
        torchs.scale((plain * gradient).sum()).backward()
        torchs.step(other)
        torchs.update()
        other.zero_grad()
        good = good + 1 if math.isfinite(gradient) else 0
        scale = scale / 2 if not math.isfinite(gradient) else scale * 2 if good == 3 else scale
        good %= 3
        assert precision.tensors()["loss_scale"] == scale == torchs.get_scale()
        assert model.weight.item() == pytest.approx(plain.item(), abs=1e-6)


def test_loss_scaling_saves_small_gradients() -> None:
    """A gradient of 1e-8 is nothing in float16 and comes through with the loss scaled."""
    model, precision = One(), Precision("float16", "cpu")
    optimiser = make_optimiser(model, "sgd", learning_rate=1.0, weight_decay=0.0)
    precision.scale((model.weight.half() * half(1.0)).float().sum() * 1e-8).backward()
    precision.unscale(optimiser)
    assert model.weight.grad.item() == pytest.approx(1e-8, rel=0.01)  # type: ignore[union-attr]
    unscaled = One()
    ((unscaled.weight.half() * half(1.0)).float().sum() * 1e-8).backward()
    assert unscaled.weight.grad.item() == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("reloads", [False, True])
def test_a_step_whose_gradients_were_dropped_does_no_harm(reloads: bool) -> None:
    model, optimiser, precision = made("float16")
    precision.scale(model(torch.ones(2, 8))).backward()
    precision.unscale(optimiser)
    optimiser.zero_grad()  # dropped: no step
    if reloads:
        precision.load_tensors(precision.tensors())
    assert train(model, optimiser, precision, range(2))[0] > 0


def test_gradients_that_never_become_finite_end_the_run() -> None:
    model, optimiser, precision = made("float16")

    def step() -> None:
        precision.scale(model.first.sum() * math.inf).backward()
        precision.unscale(optimiser)
        assert not precision.step(optimiser)

    for _ in range(32):  # from 2^16 down to 2^-16
        step()
    with pytest.raises(GristmillError, match="not finite even at a loss scale"):
        step()


def test_accumulated_micro_steps_equal_one_step_on_the_union() -> None:
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    one, many = made("float32"), made("float32")
    for (model, optimiser, _), parts in ((one, 1), (many, 6)):
        for part in x.chunk(parts):
            (model(part) / parts).backward()
        optimiser.step()
    torch.testing.assert_close(one[0].first, many[0].first, rtol=1e-5, atol=1e-6)


def test_a_fixed_order_gives_replicas_the_same_bits() -> None:
    """Replicas that add the same gradients in the same order are equal; in another order they need not be."""
    parts = torch.randn(64, 257, generator=torch.Generator().manual_seed(2)).half()

    def total(order: list[int], dtype: torch.dtype) -> Tensor:
        found = torch.zeros(257, dtype=dtype)
        for index in order:
            found += parts[index].to(dtype)
        return found

    forwards, backwards = list(range(64)), list(reversed(range(64)))
    assert torch.equal(total(forwards, torch.float16), total(forwards, torch.float16))
    assert not torch.equal(total(forwards, torch.float16), total(backwards, torch.float16))
    torch.testing.assert_close(total(forwards, torch.float32), total(backwards, torch.float32), rtol=1e-5, atol=1e-5)


def test_bad_names_and_tensors_are_refused() -> None:
    with pytest.raises(GristmillError, match="Did you mean float16"):
        Precision("flaot16", "cpu")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="loss_scale"):
        Precision("float16", "cpu").load_tensors({})
    with pytest.raises(CheckpointError, match="loss_scale"):
        Precision("float32", "cpu").load_tensors(Precision("float16", "cpu").tensors())

"""The chunked head loss against the plain one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.objectives import cross_entropy
from gristmill.objectives.cross_entropy import linear_cross_entropy_sum, reference_cross_entropy_sum
from gristmill.tokens.batch import IGNORED


def inputs(rows: int, vocabulary: int = 37, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


@given(st.integers(1, 40), st.integers(2, 60), st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_equals_the_reference_whatever_the_chunk(rows: int, vocabulary: int, chunk: int, seed: int) -> None:
    hidden, weight, targets = inputs(rows, vocabulary, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * vocabulary * chunk)
        found = linear_cross_entropy_sum(hidden, weight, targets)
        ours = torch.autograd.grad(3 * found, (hidden, weight))
    expected = reference_cross_entropy_sum(hidden, weight, targets)
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_softcap_equal_the_reference(
    with_bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * 37 * 4)
    hidden, weight, targets = inputs(11)
    targets[3] = IGNORED
    bias = torch.randn(37, generator=torch.Generator().manual_seed(1)).requires_grad_() if with_bias else None
    parts = (hidden, weight) if bias is None else (hidden, weight, bias)
    found = linear_cross_entropy_sum(hidden, weight, targets, bias, softcap=softcap)
    expected = reference_cross_entropy_sum(hidden, weight, targets, bias, softcap=softcap)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(found, parts), torch.autograd.grad(expected, parts), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_frozen_parts_get_no_gradient() -> None:
    hidden, weight, targets = inputs(6)
    linear_cross_entropy_sum(hidden, weight.detach(), targets).backward()
    theirs = torch.autograd.grad(reference_cross_entropy_sum(hidden, weight, targets), hidden)[0]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, theirs)
    linear_cross_entropy_sum(hidden.detach(), weight, targets).backward()
    assert weight.grad is not None


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(6)
    loss = linear_cross_entropy_sum(hidden * 1e4, weight, targets)
    loss.backward()
    assert math.isfinite(loss.item())
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    assert loss.item() == pytest.approx(reference_cross_entropy_sum(hidden * 1e4, weight, targets).item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_bfloat16_autocast_stays_within_its_rounding(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(64, 101, 32)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * 101 * chunk)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy_sum(hidden, weight, targets)
    found.backward()
    expected = reference_cross_entropy_sum(hidden, weight, targets)
    grads = torch.autograd.grad(expected, (hidden, weight))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    for mine, other in zip((hidden.grad, weight.grad), grads, strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        assert float((mine - other).norm() / other.norm()) < 2e-2


def test_bfloat16_weights_get_bfloat16_gradients() -> None:
    hidden, weight, targets = inputs(20)
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    linear_cross_entropy_sum(*low, targets).backward()
    expected = torch.autograd.grad(reference_cross_entropy_sum(hidden, weight, targets), (hidden, weight))
    for mine, other in zip(low, expected, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        assert float((mine.grad.float() - other).norm() / other.norm()) < 3e-2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(20)
    expected = reference_cross_entropy_sum(hidden, weight, targets).item()

    def forbidden(*_: object, **__: object) -> Tensor:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch.Tensor, "scatter_add_", forbidden)
    with mode():
        found = linear_cross_entropy_sum(hidden, weight, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert not found.requires_grad


def test_only_the_wanted_gradient_may_be_asked_for() -> None:
    hidden, weight, targets = inputs(10)
    linear_cross_entropy_sum(hidden.detach(), weight, targets).backward()
    expected = torch.autograd.grad(reference_cross_entropy_sum(hidden, weight, targets), weight)[0]
    assert hidden.grad is None
    assert weight.grad is not None
    assert torch.allclose(weight.grad, expected, atol=1e-5)


def test_no_rows_lose_nothing_and_teach_nothing() -> None:
    hidden, weight, targets = inputs(0)
    loss = linear_cross_entropy_sum(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    hidden, weight, targets = inputs(4)
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy_sum(hidden, weight, targets.fill_(-5))


def test_an_ignored_row_counts_nothing() -> None:
    hidden, weight, targets = inputs(9)
    targets[[0, 4, 8]] = IGNORED
    found = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, targets), (hidden, weight))
    expected = torch.autograd.grad(reference_cross_entropy_sum(hidden, weight, targets), (hidden, weight))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not found[0][[0, 4, 8]].any()

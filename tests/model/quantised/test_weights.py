"""The two canonical forms: what they hold, and how far off they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.int8 import dequantise, quantise
from gristmill.model.quantised import weights
from gristmill.model.quantised.weights import (
    Int4Weight,
    Int8Weight,
    check_scheme,
    join,
    pack,
    round_to_nearest,
    unpack,
)

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.sampled_from([32, 64, 128]), st.integers(0, 2**31))


def random(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) ** 3


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_two_values_share_a_byte_the_first_in_the_low_nibble(out: int, half: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (out, 2 * half), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (out, half))
    assert torch.equal(unpack(packed), codes)
    expected = (codes.numpy()[:, ::2] + 8) + 16 * (codes.numpy()[:, 1::2].astype(np.int64) + 8)
    assert (packed.numpy() == expected).all()


@settings(max_examples=40)
@given(SHAPES)
def test_four_bits_are_off_by_half_a_scale_but_for_what_is_cut(shape: tuple[int, int, int, int]) -> None:
    out, groups, size, seed = shape
    exact = random(out, groups * size, seed)
    rounded = round_to_nearest(exact, 4, size)
    assert isinstance(rounded, Int4Weight)
    assert (rounded.group_size, rounded.shape) == (size, tuple(exact.shape))
    assert rounded.scale.dtype == torch.bfloat16
    assert rounded.nbytes == exact.numel() // 2 + 2 * exact.numel() // size
    scale = rounded.scale.float().repeat_interleave(size, dim=1)
    error = (rounded.dequantised() - exact).abs()
    codes = unpack(rounded.packed).float()
    inside = (codes > -8) & (codes < 7)
    assert bool((error <= scale.abs() / 2 * (1 + 1e-5))[inside].all())
    # the other end has no +8, and a scale may be as small as 0.8 of what holds the largest value
    assert bool((error <= scale.abs() * 2.1).all())
    wide = exact.view(out, groups, size)
    widest = (wide.gather(-1, wide.abs().argmax(-1, keepdim=True)) / -8).bfloat16().float()
    plain = (wide / widest).round().clamp(-8, 7) * widest
    own = error.view_as(wide).square().sum(-1)
    assert bool((own <= (plain - wide).square().sum(-1) * 1.00001).all())  # the widest scale is among those tried
    largest = exact.view(out, groups, size).abs().argmax(-1, keepdim=True)
    assert bool((codes.view(out, groups, size).gather(-1, largest) == -8).all())  # all 16 numbers are in use


@settings(max_examples=20)
@given(SHAPES)
def test_eight_bits_are_one_rounding_per_row(shape: tuple[int, int, int, int]) -> None:
    out, groups, size, seed = shape
    exact = random(out, groups * size, seed)
    rounded = round_to_nearest(exact, 8)
    assert isinstance(rounded, Int8Weight)
    values, scale = quantise(exact, 1)
    assert torch.equal(rounded.quantised, values)
    assert torch.equal(rounded.scale, scale)
    assert torch.equal(rounded.dequantised(), dequantise(values, scale))


def test_one_scale_for_a_whole_tensor_keeps_its_bound_too() -> None:
    exact = random(40, 30)
    values, scale = quantise(exact.flatten())
    assert scale.shape == (1,)
    assert bool(((dequantise(values, scale) - exact.flatten()).abs() <= scale / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_slabs_and_parts_change_nothing(bits: weights.Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = random(37, 64)
    whole = round_to_nearest(exact, bits)
    monkeypatch.setattr(weights, "SLAB", 5 * 64)
    for other in (round_to_nearest(exact, bits), join([round_to_nearest(part, bits) for part in exact.split(10)])):
        assert torch.equal(other.dequantised(), whole.dequantised())
        assert torch.equal(other.scale, whole.scale)
    assert torch.equal(whole.dequantised(slice(3, 9)), whole.dequantised()[3:9])


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused() -> None:
    exact = random(4, 64)
    exact[1] = 0
    for bits in (4, 8):
        assert torch.equal(round_to_nearest(exact, bits).dequantised()[1], torch.zeros(64))
        broken = exact.clone()
        broken[2, 5] = float("nan")
        with pytest.raises(CheckpointError, match="not a finite number"):
            round_to_nearest(broken, bits)
    with pytest.raises(CheckpointError, match="no whole number of groups of 32"):
        round_to_nearest(random(4, 48), 4, 32)


@pytest.mark.parametrize(
    ("scheme", "group_size", "field"), [("int5", 32, "scheme"), ("int4", 48, "group_size"), ("int4", 0, "group_size")]
)
def test_what_no_kernel_has_is_refused_by_name(scheme: str, group_size: int, field: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_scheme(scheme, group_size)
    assert refused.value.field == field

"""Eight bits in place of thirty-two: how far off, how much smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gristmill.errors import CheckpointError
from gristmill.model import int8
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.int8 import Int8Linear, dequantise, integer_product, quantise
from gristmill.model.quantised.quantise import quantise_model
from model import tiny

_NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=_NUMBERS))
def test_the_error_is_at_most_half_a_scale(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    for dim in range(x.ndim):
        quantised, scale = quantise(x, dim)
        assert quantised.dtype == torch.int8
        assert int(quantised.int().abs().max()) <= 127
        assert scale.shape == (*x.shape[:dim], 1, *x.shape[dim + 1 :])
        error = (x.double() - quantised.double() * scale.double()).abs()
        assert bool((error <= scale.double() / 2 * (1 + 2e-5)).all())  # 127 roundings of float32 at most
        assert bool((quantised.sign() * x.sign() >= 0).all())


def test_the_largest_of_each_row_is_127_and_zeros_stay() -> None:
    x = torch.tensor([[254.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, -0.4, 0.2, 0.4]])
    quantised, scale = quantise(x, 1)
    assert quantised.tolist() == [[127, -1, 0, 0], [0, 0, 0, 0], [32, -127, 64, 127]]
    assert scale[0].item() == 2.0
    assert torch.equal(dequantise(quantised, scale)[1], torch.zeros(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass_for_a_number(bad: float) -> None:
    x = torch.ones(2, 8)
    x[0, 3] = bad
    assert not bool(dequantise(*quantise(x, 1))[0].isfinite().any())
    out = Int8Linear(torch.ones(4, 8))(x)
    assert not bool(out[0].isfinite().any())
    assert bool(out[1].isfinite().all())
    with pytest.raises(CheckpointError, match="not a finite number"):
        Int8Linear(x)


@pytest.mark.parametrize("kernel", [True, False])
@settings(max_examples=40)
@given(data=st.data())
def test_the_product_is_exact(kernel: bool, data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 70)) for _ in range(3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    extreme = data.draw(st.booleans())  # sums as large as they can be
    left, right = (
        (torch.randint(0, 2, shape, generator=generator) * 255 - 128).to(torch.int8)
        if extreme
        else torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        for shape in ((m, k), (n, k))
    )
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(int8, "_has_kernel", lambda *_: False)
        product = integer_product(left, right)
    assert product.dtype == torch.int32
    assert torch.equal(product, left.int() @ right.int().T)


def test_long_sums_are_exact_as_far_as_they_fit_and_refused_beyond() -> None:
    longest = torch.full((2, 2**17 - 1), -128, dtype=torch.int8)
    assert integer_product(longest, longest).tolist() == [[128 * 128 * (2**17 - 1)] * 2] * 2
    beyond = torch.full((1, 2**17), -128, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="131072 values may leave the range of int32"):
        integer_product(beyond, beyond)


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_its_rounded_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 12, generator=generator), torch.randn(7, generator=generator)
    x = torch.randn(shape, generator=generator).to(dtype)
    out = Int8Linear(weight, bias)(x)
    assert (out.dtype, out.shape) == (dtype, (*shape[:-1], 7))
    expected = dequantise(*quantise(x, -1)) @ dequantise(*quantise(weight, 1)).T + bias
    torch.testing.assert_close(out, expected.to(dtype))


def test_a_tiny_model_keeps_its_logits_in_a_quarter_of_the_bytes() -> None:
    model, ids = tiny.model(), tiny.ids(100)
    with torch.no_grad():
        before = model(ids)
    linears = [layer for layer in model.layers.modules() if type(layer) is torch.nn.Linear]
    size = sum(layer.weight.nbytes for layer in linears)
    report = quantise_model(model, "w8a8", head=False)
    after = model(ids)
    assert len(report.layers) == len(linears) == 4 * 3
    assert report.left == ("embed_tokens.weight",)
    quantised = [layer for layer in model.layers.modules() if isinstance(layer, Int8Linear)]
    assert sum(layer.quantised.nbytes for layer in quantised) * 4 == size
    assert sum(layer.scale.nbytes for layer in quantised) <= size // 4 / 8  # rows of a real model are longer
    difference = (after - before).std() / before.std()
    agreement = (after.argmax(-1) == before.argmax(-1)).float().mean()
    assert difference < 0.2, f"{difference=}"
    assert agreement >= 0.75, f"{agreement=}"
    assert not torch.equal(after, before)  # the layers are really in use
    assert not after.requires_grad


@pytest.mark.asset
def test_a_real_model_says_nearly_the_same() -> None:
    from gristmill.model.load import load_model

    model, tokenizer = load_model("smollm2-135m")
    text = (
        "The Moon is the only natural satellite of the Earth. It orbits at an average distance of 384,400 km, about "
        "thirty times the diameter of the Earth, and its pull is the main cause of the tides. People first walked "
        "on it in 1969, and brought back rocks that told how it was formed."
    )
    ids = torch.tensor(tokenizer.encode(text))
    with torch.no_grad():
        before = model(ids)
    report = quantise_model(model, "w8a8", head=False)
    after = model(ids)
    matrices = [(layer.bytes_before, layer.bytes_after) for layer in report.layers]
    assert all(before / 4 < after < 0.26 * before for before, after in matrices)  # and the scales
    difference = float((after - before).abs().max())
    agreement = float((after.argmax(-1) == before.argmax(-1)).float().mean())
    print(f"largest difference of logits {difference:.2f} (std {float(before.std()):.2f}), same argmax {agreement:.3f}")
    targets = ids[1:]
    losses = [float(torch.nn.functional.cross_entropy(logits[:-1], targets)) for logits in (before, after)]
    print(f"nats per token {losses[0]:.3f} and {losses[1]:.3f}")
    assert difference < 2 * float(before.std())
    assert agreement >= 0.85
    assert losses[1] < losses[0] + 0.15


def test_an_eight_bit_model_is_not_written_as_if_it_were_whole(tmp_path: Path) -> None:
    model = tiny.model()
    quantise_model(model, "w8a8", head=False)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.qkv_proj\.weight: packed or quantised"):
        save_huggingface(model, tmp_path / "export")

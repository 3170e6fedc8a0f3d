"""Layers of quantised weights are the product with the expanded matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gristmill.model.int8 import Int8Linear
from gristmill.model.quantised import linear
from gristmill.model.quantised.linear import Int4Linear, Int8Embedding, Int8WeightLinear, build_linear, weight_of
from gristmill.model.quantised.weights import Int8Weight, Scheme, bits_of, round_to_nearest

KINDS = {"int8": Int8WeightLinear, "w8a8": Int8Linear, "int4": Int4Linear}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 9, 64), (0, 64)])
def test_the_layer_multiplies_with_the_expanded_matrix(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SLAB", 7 * 64)  # several slabs, the last one shorter
    weight = round_to_nearest(random(33, 64), bits_of(scheme, 64, 32))
    bias = random(33, seed=1).to(dtype)
    x = random(*shape, seed=2).to(dtype)
    layer = build_linear(weight, bias, scheme)
    assert type(layer) is KINDS[scheme]
    out = layer(x)
    expected = F.linear(x.float(), weight.dequantised(), bias.float())
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    close = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=close, atol=close * 8)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4"])
def test_a_layer_holds_the_canonical_tensors_and_no_copy(scheme: Scheme) -> None:
    weight = round_to_nearest(random(8, 64), bits_of(scheme, 64, 32))
    layer = build_linear(weight, None, scheme)
    again = weight_of(layer)
    assert type(again) is type(weight)
    assert again.scale.data_ptr() == weight.scale.data_ptr()
    names = {"int4": {"packed", "scale"}}.get(scheme, {"quantised", "scale"})
    assert set(layer.state_dict()) == names
    assert (layer.in_features, layer.out_features) == (64, 8)


def test_eight_bit_activations_are_those_of_the_layer_made_from_floats() -> None:
    exact, x = random(8, 64), random(5, 64, seed=1)
    weight = round_to_nearest(exact, 8)
    assert torch.equal(build_linear(weight, None, "w8a8")(x), Int8Linear(exact)(x))


def test_an_embedding_gives_the_rows() -> None:
    exact, ids = random(20, 16), torch.tensor([[3, 3], [19, 0]])
    weight = round_to_nearest(exact, 8)
    assert isinstance(weight, Int8Weight)
    rows = Int8Embedding(weight)(ids)
    assert torch.equal(rows, weight.dequantised()[ids])
    assert Int8Embedding(weight, torch.bfloat16)(ids).dtype == torch.bfloat16
    assert (rows - nn.Embedding.from_pretrained(exact)(ids)).abs().max() <= weight.scale.max() / 2 * 1.001

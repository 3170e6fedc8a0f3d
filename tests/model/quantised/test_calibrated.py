"""GPTQ and AWQ: equal to their plain definitions, and no worse than rounding on what they were calibrated on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.config import AttentionConfig, FeedForwardConfig, NormConfig
from gristmill.model.quantised.awq import folds, search_scale
from gristmill.model.quantised.calibrate import Inputs, measured_blocks
from gristmill.model.quantised.gptq import gptq, output_error
from gristmill.model.quantised.quantise import Method, quantise_model
from gristmill.model.quantised.weights import Bits, codes_of, round_to_nearest, scales_of
from model.quantised import tiny4


def layer(seed: int = 0, out: int = 24, inputs: int = 96, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A matrix and the second moments of inputs that hang together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator) ** 4
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    return weight, x.T @ x / tokens


def plain_gptq(weight: Tensor, hessian: Tensor, bits: Bits, group: int, by_activation: bool) -> Tensor:
    """Optimal brain quantisation in a fixed order, from its definition: after each column the inverse of the Hessian of
    the columns that are left is computed anew."""
    columns = weight.shape[1]
    width = columns if bits == 8 else group
    left, moments = weight.double().clone(), hessian.double()
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(columns, dtype=torch.double)
    order = hessian.diagonal().argsort(descending=True).tolist() if by_activation else list(range(columns))
    scale = scales_of(weight.unflatten(1, (-1, width)), bits)[..., 0].double()
    out = torch.empty_like(left)
    for number, column in enumerate(order):
        rest = order[number:]
        if not by_activation and column % width == 0:
            scale[:, column // width] = scales_of(left[:, column : column + width].float(), bits)[:, 0].double()
        inverse = torch.linalg.inv(moments[rest][:, rest])
        own = scale[:, column // width]
        out[:, column] = codes_of(left[:, column], own, bits) * own
        error = (left[:, column] - out[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("block", [96, 128, 40])  # 40: a group begins in one block and ends in the next
def test_gptq_is_its_definition_however_the_columns_are_blocked(bits: Bits, by_activation: bool, block: int) -> None:
    weight, hessian = layer()
    found = gptq(weight, hessian, bits, 32, by_activation=by_activation, block=block).dequantised()
    expected = plain_gptq(weight, hessian, bits, 32, by_activation)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("by_activation", [False, True])
def test_gptq_beats_rounding_on_what_it_was_calibrated_on(bits: Bits, by_activation: bool) -> None:
    for seed in range(5):
        weight, hessian = layer(seed)
        nearest = output_error(weight, round_to_nearest(weight, bits).dequantised(), hessian)
        found = output_error(weight, gptq(weight, hessian, bits, by_activation=by_activation).dequantised(), hessian)
        assert found < 0.85 * nearest


def test_gptq_on_inputs_that_do_not_hang_together_is_rounding() -> None:
    weight, _ = layer()
    found = gptq(weight, torch.eye(96), 4, 32)
    assert torch.equal(found.dequantised(), round_to_nearest(weight, 4, 32).dequantised())
    dead = torch.zeros(96, 96)  # inputs that never came are rounded to nearest too, and not forgotten
    assert torch.equal(gptq(weight, dead, 4, 32).dequantised(), found.dequantised())
    with pytest.raises(CheckpointError, match="not finite or all alike"):
        gptq(weight, torch.full((96, 96), float("nan")), 4, 32)


def test_output_error_is_that_of_the_outputs() -> None:
    x, weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), torch.randn(8, 32)
    rounded = round_to_nearest(weight, 4).dequantised()
    outputs = x @ weight.T
    expected = float((x @ rounded.T - outputs).square().sum() / outputs.square().sum())
    assert output_error(weight, rounded, x.T @ x / 50) == pytest.approx(expected, rel=1e-4)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "norm": NormConfig(unit_offset=True), "attention": AttentionConfig(qkv_bias=True)},
    {"norm": NormConfig(kind="layer", bias=True), "attention": AttentionConfig(qk_norm="head", qkv_bias=True)},
    {"feed_forward": FeedForwardConfig(gated=False, activation="relu", bias=True)},
    {"parallel": "one_norm"},
    {"parallel": "two_norms"},
    {"norm": NormConfig(placement="post")},
    {"norm": NormConfig(placement="sandwich"), "feed_forward": FeedForwardConfig(bias=True)},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_folding_a_scale_changes_nothing(changes: dict[str, Any]) -> None:
    model, ids = tiny4.model(**changes), torch.tensor(tiny4.text()[0])
    before = model(ids)
    generator = torch.Generator().manual_seed(0)
    count = 0
    for index, block in enumerate(model.layers):
        for fold in folds(f"layers.{index}.", block):
            assert model.get_submodule(fold.name) is fold.layer
            values = fold.layer.in_features // fold.repeats
            old = fold.layer.weight.clone()
            fold.apply(torch.rand(values, generator=generator) * 3 + 0.2)
            assert not torch.equal(old, fold.layer.weight)
            count += 1
    kinds = 4 - 2 * ("parallel" in changes and changes["parallel"] == "one_norm")
    kinds -= 2 * (changes.get("norm", NormConfig()).placement == "post") + ("relu" in str(changes))
    assert count == kinds * len(model.layers)
    torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-3)


def test_the_searched_scale_is_never_worse_than_rounding_and_better_where_some_inputs_are_large() -> None:
    model = tiny4.model()
    gained = []
    for measured in measured_blocks(model, tiny4.text()):
        for fold in folds(measured.prefix, measured.block):
            inputs, weight = measured.inputs[fold.name], fold.layer.weight
            columns = fold.per_input(search_scale(fold, inputs, 4, 32))
            scaled = round_to_nearest(weight * columns, 4).dequantised() / columns
            nearest = output_error(weight, round_to_nearest(weight, 4).dequantised(), inputs.hessian)
            gained.append(output_error(weight, scaled, inputs.hessian) / nearest)
    assert max(gained) <= 1 + 1e-6
    assert min(gained) < 0.9


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_calibrated_model_is_nearer_to_the_original_than_a_rounded_one(method: Method, scheme: Any) -> None:
    text = tiny4.text(12)
    exact = tiny4.model()
    ids = torch.tensor(text)
    with torch.no_grad():
        before = exact(ids)
    off = {}
    for name in ("round", method):
        model = copy.deepcopy(exact)
        report = quantise_model(model, scheme, method=name, calibration=None if name == "round" else text, head=False)
        off[name] = float((model(ids) - before).square().mean())
        assert len(report.layers) == 4 * len(model.layers)
        assert all((layer.output_error is None) == (name == "round") for layer in report.layers)
    assert off[method] < off["round"]


def test_a_block_is_measured_behind_quantised_blocks() -> None:
    text = tiny4.text(3)
    exact, changed = tiny4.model(), tiny4.model()
    plain = [measured.inputs for measured in measured_blocks(exact, text)]
    seen = []
    for measured in measured_blocks(changed, text):
        seen.append(measured.inputs)
        with torch.no_grad():
            changed.get_submodule(f"{measured.prefix}mlp.down_proj").weight.zero_()
    first, second = "layers.0.self_attn.qkv_proj", "layers.1.self_attn.qkv_proj"
    assert torch.equal(seen[0][first].hessian, plain[0][first].hessian)
    assert not torch.allclose(seen[1][second].hessian, plain[1][second].hessian)


def test_moments_do_not_depend_on_how_the_text_is_cut() -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Inputs(8), Inputs(8)
    whole.add(x)
    for part in x.split([1, 0, 40, 19]):
        parts.add(part)
    assert parts.tokens == 60
    torch.testing.assert_close(parts.hessian, x.T @ x / 60)
    torch.testing.assert_close(parts.hessian, whole.hessian)
    torch.testing.assert_close(parts.magnitude, x.abs().mean(0))


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"method": "gptq"}, "calibration", "needs calibration"),
        ({"method": "round", "calibration": [[1]]}, "calibration", "does not apply"),
        ({"method": "awk"}, "method", "not one of round, gptq, awq"),
        ({"method": "awq", "calibration": []}, "calibration", "no sequences"),
        ({"method": "awq", "calibration": [[1], []]}, "calibration", "sequence 1 has 0 tokens"),
        ({"method": "gptq", "calibration": [[1] * 129]}, "calibration", "129 tokens, the context holds 128"),
        ({"method": "gptq", "calibration": [[300]]}, "calibration", "outside the vocabulary of 300"),
    ],
)
def test_what_cannot_calibrate_is_refused(options: dict[str, Any], field: str, words: str) -> None:
    model = tiny4.model()
    with pytest.raises(RequestError, match=words) as refused:
        quantise_model(model, "int4", **options)
    assert refused.value.field == field
    assert all(type(layer) is nn.Linear for layer in (model.lm_head, model.layers[0].mlp.down_proj))

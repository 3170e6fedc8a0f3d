"""A whole model quantised: what is replaced, what is left, how many bytes, how far off."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import helpers
from gristmill.core import SamplingParams
from gristmill.engine.engine import Engine
from gristmill.errors import CheckpointError, RequestError
from gristmill.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    LatentConfig,
    LayerConfig,
    MoEConfig,
)
from gristmill.model.int8 import Int8Linear
from gristmill.model.pruning import prune_linears
from gristmill.model.quantised.checkpoint import save_quantised
from gristmill.model.quantised.compare import compare_models
from gristmill.model.quantised.linear import Int4Linear, Int8Embedding, Int8WeightLinear, weight_of
from gristmill.model.quantised.quantise import model_bytes, quantise_model
from gristmill.model.quantised.weights import Scheme, round_to_nearest
from model import tiny
from model.quantised import tiny4

KINDS = {"int8": Int8WeightLinear, "w8a8": Int8Linear, "int4": Int4Linear}
SCHEMES: list[Scheme] = ["int8", "w8a8", "int4"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_is_replaced_by_its_rounded_self(scheme: Scheme) -> None:
    exact = tiny4.model()
    model = copy.deepcopy(exact)
    report = quantise_model(model, scheme)
    replaced = {name: layer for name, layer in model.named_modules() if isinstance(layer, tuple(KINDS.values()))}
    assert {layer.name for layer in report.layers} == set(replaced) == {"lm_head", *_projections(exact)}
    for name, layer in replaced.items():
        own = exact.get_submodule(name)
        assert isinstance(own, nn.Linear)
        bits = 4 if scheme == "int4" and name != "lm_head" else 8
        assert type(layer) is KINDS[scheme if bits == 4 or scheme != "int4" else "int8"]
        assert torch.equal(weight_of(layer).dequantised(), round_to_nearest(own.weight, bits).dequantised())
    assert report.left == ("embed_tokens.weight",)
    assert torch.equal(model.embed_tokens.weight, exact.embed_tokens.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = tiny.ids(60)
    with torch.no_grad():
        off = (model(ids) - exact(ids)).std() / exact(ids).std()
    assert 0 < off < {"int8": 0.1, "w8a8": 0.2, "int4": 0.7}[scheme]


def test_eight_bits_take_three_quarters_off_the_weights_in_memory_and_on_disk(tmp_path: Path) -> None:
    """fp32 : fp16 : int8 = 4 : 2 : 1, and the scales beside; and what it costs is told."""
    exact = tiny4.model(hidden_size=256, intermediate_size=512, vocab_size=500)
    model, half = copy.deepcopy(exact), copy.deepcopy(exact).half()
    report = quantise_model(model, "int8", embedding=True)
    matrices = [parameter for parameter in exact.parameters() if parameter.ndim == 2]
    whole = sum(parameter.nbytes for parameter in matrices)
    halves = sum(parameter.nbytes for parameter in half.parameters() if parameter.ndim == 2)
    stored = {layer.quantised.data_ptr(): layer.quantised for layer in model.modules() if hasattr(layer, "quantised")}
    eighths = sum(tensor.nbytes for tensor in stored.values())
    assert (whole, halves) == (4 * eighths, 2 * eighths)
    assert report.bytes_before == model_bytes(exact) == sum(parameter.nbytes for parameter in exact.parameters())
    assert report.bytes_after == model_bytes(model)
    assert report.bytes_after < 0.265 * report.bytes_before
    assert report.left == ()
    save_quantised(model, helpers.tokenizer(), tmp_path / "int8", report)
    helpers.save(tmp_path / "float", exact)
    files = [tmp_path / name / "model.safetensors" for name in ("float", "int8")]
    assert files[1].stat().st_size < 0.275 * files[0].stat().st_size
    told = compare_models(exact, model, tiny4.text(3))
    assert told.perplexity_after / told.perplexity_before == pytest.approx(math.exp(told.added_nats), rel=1e-6)
    assert abs(told.added_nats) < 0.05


def test_four_bits_take_an_eighth_and_their_scales() -> None:
    report = quantise_model(tiny4.model(), "int4", group_size=64, head=False)
    for layer in report.layers:
        if layer.bits == 4:
            assert layer.bytes_after == layer.bytes_before / 8 + layer.bytes_before / 4 / 64 * 2
    # the feed-forward layer is 96 wide, which groups of 64 do not divide
    assert report.in_eight_bits == [f"layers.{index}.mlp.down_proj" for index in range(3)]
    assert {layer.name for layer in report.layers if layer.bits == 8} == set(report.in_eight_bits)


def test_a_tied_head_has_a_copy_or_shares_the_embedding_or_stays() -> None:
    copied, shared, left = tiny4.model(), tiny4.model(), tiny4.model()
    quantise_model(copied, "w8a8")
    assert isinstance(copied.lm_head, Int8Linear)
    assert isinstance(copied.embed_tokens, nn.Embedding)
    quantise_model(shared, "int4", embedding=True)
    assert isinstance(shared.embed_tokens, Int8Embedding)
    assert isinstance(shared.lm_head, Int8WeightLinear)
    assert shared.lm_head.quantised.data_ptr() == shared.embed_tokens.quantised.data_ptr()
    quantise_model(left, "int4", head=False)
    assert left.lm_head.weight is left.embed_tokens.weight
    ids = tiny.ids(9)
    assert torch.equal(shared.lm_head.quantised, copied.lm_head.quantised)
    assert shared(ids).shape == copied(ids).shape == left(ids).shape == (9, 300)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": tuple(LayerConfig(mixer=mixer) for mixer in ("linear", "selective", "delta"))},
        {
            "attention": AttentionConfig(latent=LatentConfig(kv_rank=20, nope_dim=12, rope_dim=4, value_dim=10)),
            "num_key_value_heads": 4,
        },
        {"feed_forward": FeedForwardConfig(gated=False, activation="relu", bias=True)},
    ],
    ids=["states", "latent", "biases"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_layer_works_with_quantised_products(scheme: Scheme, changes: dict[str, Any]) -> None:
    model, ids = tiny4.model(**changes), tiny.ids(40)
    with torch.no_grad():
        before = model(ids)
    quantise_model(model, scheme)
    after = model(ids)
    assert not torch.equal(after, before)
    assert (after - before).std() < (0.8 if scheme == "int4" else 0.3) * before.std()


def test_experts_are_named_as_left_and_a_broken_model_stays_as_it_was() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=24)
    report = quantise_model(tiny4.model(feed_forward=FeedForwardConfig(moe=moe)), "int4")
    assert {"layers.0.mlp.gate_up_proj", "layers.0.mlp.down_proj"} <= set(report.left)
    broken = tiny4.model()
    with torch.no_grad():
        broken.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj: a weight is not a finite number"):
        quantise_model(broken, "int8")
    assert not any(isinstance(layer, tuple(KINDS.values())) for layer in broken.modules())
    done = tiny4.model()
    quantise_model(done, "int8")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantise_model(done, "int8")


def test_the_comparison_tells_what_the_two_models_say() -> None:
    before, after = tiny4.model(), tiny4.model()
    windows = tiny4.text(4)
    same = compare_models(before, copy.deepcopy(before), windows)
    assert (same.added_nats, same.standard_error, same.largest_difference, same.greedy_agreement) == (0, 0, 0, 1)
    quantise_model(after, "int4")
    found = compare_models(before, after, windows)
    ids = torch.tensor(windows)
    with torch.no_grad():
        logits = [model(ids)[:, :-1] for model in (before, after)]
    nats = [torch.nn.functional.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten(), reduction="none") for x in logits]
    assert found.tokens == ids[:, 1:].numel()
    assert found.perplexity_before == pytest.approx(math.exp(nats[0].mean()), rel=1e-5)
    assert found.perplexity_after == pytest.approx(math.exp(nats[1].mean()), rel=1e-5)
    added = (nats[1] - nats[0]).view(4, -1)
    assert found.added_nats == pytest.approx(float(added.mean()), rel=1e-4)
    assert found.standard_error == pytest.approx(float(added.mean(1).std() / 4**0.5), rel=1e-4)
    assert found.largest_difference == pytest.approx(float((logits[0] - logits[1]).abs().max()), rel=1e-5)
    agreed = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    assert found.greedy_agreement == pytest.approx(float(agreed))
    assert found.speed_before > 0 < found.speed_after
    with pytest.raises(RequestError, match="too few tokens"):
        compare_models(before, after, windows[:1])


def test_what_int8_and_pruning_cost_stands_beside_what_they_save() -> None:
    """Perplexity, speed and memory of each; pruning nothing is the identity, pruning much costs more than int8."""
    exact, windows = tiny4.model(), tiny4.text(4)
    told = {}
    for name, share in {"int8": None, "nothing": 0.0, "third": 0.3}.items():
        model = copy.deepcopy(exact)
        if share is None:
            quantise_model(model, "int8")
        else:
            prune_linears(model, share)
        told[name] = (compare_models(exact, model, windows), model_bytes(model) / model_bytes(exact))
    assert told["nothing"][0].added_nats == told["nothing"][0].largest_difference == 0
    assert abs(told["int8"][0].added_nats) < abs(told["third"][0].added_nats)
    assert told["int8"][1] < 1 == told["nothing"][1] == told["third"][1]
    assert all(found.speed_after > 0 for found, _ in told.values())


COMPRESSED: dict[str, Any] = {
    "int8": lambda model: quantise_model(model, "int8"),
    "w8a8": lambda model: quantise_model(model, "w8a8"),
    "int4": lambda model: quantise_model(model, "int4"),
    "pruned": lambda model: prune_linears(model, 0.3),
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("changes", [{}, {"layers": (LayerConfig(window=8),) * 3}], ids=["grouped", "windows"])
def test_the_engine_runs_it(kind: str, changes: dict[str, Any]) -> None:
    """Grouped queries, sliding windows, quantised, pruned: greedy tokens are those of the plain forward."""
    model = tiny4.model(**changes)
    COMPRESSED[kind](model)
    prompt = helpers.prompt(20)
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=256)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found = helpers.only(engine, prompt, params).token_ids
    sequence = list(prompt)
    with torch.inference_mode():
        for _ in range(6):
            sequence.append(int(model(torch.tensor(sequence))[-1].argmax()))
    assert found == sequence[20:]


def _projections(model: nn.Module) -> set[str]:
    return {name for name, layer in model.named_modules() if type(layer) is nn.Linear and name != "lm_head"}

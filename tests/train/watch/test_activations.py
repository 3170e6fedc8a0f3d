"""What the monitors see inside a model equals a computation by hand, and looking changes nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.errors import GristmillError
from gristmill.model.attention.packed import PackedAttention, segment_positions
from gristmill.model.config import FeedForwardConfig, LatentConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig
from gristmill.model.transformer import Stack, Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.train.watch.activations import ActivationMonitor, observe
from gristmill.train.watch.attention_entropy import EntropyTap, attention_entropy
from train.toy import CONFIG, toy_loader

IDS = torch.arange(17) * 5 % CONFIG.vocab_size
LENGTHS = (7, 4, 6)


def built(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    model = Transformer(config)
    model.initialise(seed)
    return model


def looked_at(model: Stack, **options: Any) -> dict[str, Any]:
    def forward() -> None:
        model.hidden_states(IDS, segment_positions(LENGTHS), PackedAttention(LENGTHS))

    return observe(model, forward, **options)


def entropy_by_hand(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    prefix: int = 0,
    sink: float | None = None,
) -> list[list[float]]:
    """Entropies (heads, queries) in plain Python, of scores q k / sqrt(head_dim)."""
    found = []
    for head in range(query.shape[1]):
        own = key[:, head * key.shape[1] // query.shape[1]]
        row = []
        for place in range(len(query)):
            seen = [
                other
                for other in range(len(key))
                if other < prefix
                or ((other <= place or not causal) and (window is None or abs(place - other) < window))
            ]
            scores = [float(query[place, head] @ own[other]) / math.sqrt(query.shape[-1]) for other in seen]
            scores += [] if sink is None else [sink]
            total = sum(map(math.exp, scores))
            row.append(-sum(math.exp(s) / total * math.log(math.exp(s) / total) for s in scores))
        found.append(row)
    return found


@pytest.mark.parametrize("case", [{}, {"causal": False}, {"window": 3}, {"prefix": 4}, {"sink": 0.7}])
def test_attention_entropy_equals_its_definition(case: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    sinks = torch.full((4,), case["sink"]) if "sink" in case else None
    rule = AttentionRule(causal=case.get("causal", True), window=case.get("window"), sinks=sinks)
    found: list[tuple[Tensor, Tensor]] = []
    cache = PackedAttention([6], prefix_lengths=[case["prefix"]] if "prefix" in case else None)
    tap = EntropyTap(cache, 1, lambda nats, share: found.append((nats, share)))
    value = torch.randn(6, 2, 8)
    assert torch.equal(tap.attend(0, query, key, value, rule), cache.attend(0, query, key, value, rule))
    (nats, share), expected = found[0], torch.tensor(entropy_by_hand(query, key, **case))
    alone = expected == 0.0  # a query that sees one thing has no choice
    assert torch.equal(nats.isnan(), alone)
    torch.testing.assert_close(nats[~alone], expected[~alone], atol=1e-5, rtol=1e-5)
    assert float(share.nan_to_num().max()) <= 1.0 + 1e-6


def test_even_attention_has_share_one_and_a_sharp_one_zero() -> None:
    mask = torch.ones(5, 5).tril().bool()
    nats, share = attention_entropy(torch.zeros(5, 2, 4), torch.randn(5, 2, 4), mask, CAUSAL)
    torch.testing.assert_close(nats[0, 1:], torch.arange(2, 6).log())
    torch.testing.assert_close(share[:, 1:], torch.ones(2, 4))
    sharp = 1000 * torch.eye(5)[:, None]
    assert float(attention_entropy(sharp, sharp, mask, CAUSAL)[1][:, 1:].max()) < 1e-6


def test_a_bias_by_position_takes_part_and_only_the_first_rows_are_looked_at() -> None:
    def bias(queries: Tensor, keys: Tensor) -> Tensor:
        return torch.where(keys[None, :] == 0, 1000.0, 0.0).expand(1, len(queries), -1)

    found: list[Tensor] = []
    tap = EntropyTap(PackedAttention([4, 5, 3]), 2, lambda _, share: found.append(share))
    zeros = torch.zeros(12, 1, 4)
    tap.attend(0, zeros, zeros, zeros, AttentionRule(bias=bias))
    assert [share.shape[1] for share in found] == [4, 5]
    assert float(torch.cat(found, dim=1).nan_to_num().max()) < 1e-6


def test_activations_equal_a_walk_through_the_blocks() -> None:
    model = built()
    figures = looked_at(model)["activations"]
    positions, cache = segment_positions(LENGTHS), PackedAttention(LENGTHS)
    with torch.no_grad():
        x = model.embed(IDS, positions)
        step = model.step(positions, cache, x.dtype)
        for layer, block in enumerate(model.layers):
            x = block(x, step, layer)
            expected = {"mean": x.mean(), "std": x.std(correction=0), "max_abs": x.abs().max()}
            assert figures[f"layers.{layer}"] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_planted_dead_units_are_counted(gated: bool) -> None:
    model = built(replace(CONFIG, feed_forward=FeedForwardConfig(activation="relu", gated=gated)))
    mlp = model.layers[1].mlp
    entry = mlp.gate_up_proj if gated else mlp.up_proj
    alive = looked_at(model)["dead_units"]
    assert max(alive.values()) < 0.3
    with torch.no_grad():
        entry.weight[:8] = 0.0
        entry.weight[8:].uniform_(0.5, 1.0)
        model.layers[1].feedforward_norm.weight.fill_(1.0)
    inner: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    dead = looked_at(model)["dead_units"]
    assert dead["layers.0"] == alive["layers.0"]
    assert dead["layers.1"] == float((inner[0].abs() <= 1e-4).all(dim=0).double().mean()) >= 8 / 32


def test_a_unit_that_fires_in_one_batch_of_two_is_alive() -> None:
    model = built(replace(CONFIG, feed_forward=FeedForwardConfig(activation="relu", gated=False)))

    def on(ids: Tensor) -> float:
        return observe(model, lambda: model(ids))["dead_units"]["layers.0"]

    left, right = torch.tensor([1, 2]), torch.tensor([3, 4])
    both = observe(model, lambda: (model(left), model(right)))["dead_units"]["layers.0"]
    assert both < min(on(left), on(right))


def test_experts_without_a_token_are_counted() -> None:
    moe = MoEConfig(num_experts=8, top_k=1, intermediate_size=16, shared_intermediate_size=8)
    model = built(replace(CONFIG, feed_forward=FeedForwardConfig(moe=moe)))
    with torch.no_grad():
        model.layers[1].mlp.router.weight.zero_()  # a draw: the first expert gets all
    found = looked_at(model)
    assert found["dead_experts"]["layers.1"] == 7 / 8
    assert set(found["dead_units"]) == {"layers.0.mlp.shared_expert", "layers.1.mlp.shared_expert"}


def test_layers_that_share_weights_and_latent_attention_are_seen() -> None:
    layers = (LayerConfig(), LayerConfig(weights_from=0), LayerConfig())
    shared = looked_at(built(replace(CONFIG, num_hidden_layers=3, layers=layers)))
    assert set(shared["activations"]) == set(shared["attention_entropy"]) == {"layers.0", "layers.1", "layers.2"}
    latent = LatentConfig(q_rank=None, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=8)
    config = replace(
        CONFIG,
        num_key_value_heads=2,
        attention=replace(CONFIG.attention, latent=latent),
        positions=replace(CONFIG.positions, rope=CONFIG.positions.rope or RopeConfig()),
    )
    assert 0.0 < looked_at(built(config))["attention_entropy"]["layers.0"]["share"] <= 1.0


def test_a_value_that_is_not_finite_is_null_and_every_hook_is_gone_after() -> None:
    model = built()
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0] = math.inf
    assert looked_at(model)["activations"]["layers.1"] == {"mean": None, "std": None, "max_abs": None}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_compiled_blocks_are_seen_alike() -> None:
    plain, compiled = built(), built()
    for block in compiled.layers:
        block.compile(backend="eager")
    batch = toy_loader().batch(0)
    CausalLM().loss_sum(compiled, batch)
    found = [observe(model, lambda model=model: CausalLM().loss_sum(model, batch)) for model in (plain, compiled)]
    assert found[0] == found[1]
    assert "layers.1" in found[1]["activations"]


@pytest.mark.parametrize("name", ["every", "batches", "rows"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(GristmillError, match=name):
        ActivationMonitor(**{name: 0})

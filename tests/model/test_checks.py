"""Apply or refuse: no field of a configuration can be set without an effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.attention.layer import StatesMemory
from gristmill.model.attention.packed import PackedAttention, PackedCross
from gristmill.model.attention.patterns import Banded
from gristmill.model.config import (
    EmbeddingConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
)
from gristmill.model.encoder import Encoder
from gristmill.model.heads import HeadConfig, build_head
from gristmill.model.transformer import Transformer
from model import parts

MIXTURE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8, num_groups=2, top_groups=1)
BASES: dict[str, ModelConfig] = {
    "plain": parts.BASE,
    "latent": parts.config("rope", "latent"),
    "shared scores": parts.config("rope", "shared weights"),
    "shared keys": parts.config("rope", "shared keys"),
    "shared layers": replace(parts.BASE, layers=(LayerConfig(), LayerConfig(weights_from=0))),
    "recurrent first": replace(parts.BASE, layers=(LayerConfig(mixer="linear"), LayerConfig())),
    "recurrent last": replace(parts.BASE, layers=(LayerConfig(), LayerConfig(mixer="delta"))),
    "mixture": replace(
        parts.BASE, feed_forward=FeedForwardConfig(moe=MIXTURE), layers=(LayerConfig(), LayerConfig(sparse=False))
    ),
    "biased": replace(parts.BASE, positions=replace(parts.POSITIONS["alibi"], rope=RopeConfig())),
    "encoder": replace(parts.BASE, causal=False),
}

Change = Callable[[ModelConfig], ModelConfig]


def at(group: str, **fields: Any) -> Change:
    return lambda config: replace(config, **{group: replace(getattr(config, group), **fields)})


def layer(index: int, **fields: Any) -> Change:
    def change(config: ModelConfig) -> ModelConfig:
        entries = list(config.layers or (LayerConfig(), LayerConfig()))
        entries[index] = replace(entries[index], **fields)
        return replace(config, layers=tuple(entries))

    return change


def local(index: int) -> Change:
    return lambda config: layer(index, rotary="local")(at("positions", local_rope=RopeConfig(theta=7.0))(config))


CHANGES: dict[str, Change] = {
    **{f"attention.{name}": at("attention", **{name: True}) for name in ("qkv_bias", "output_bias", "sinks")},
    **{f"attention.qk_norm {kind}": at("attention", qk_norm=kind) for kind in ("head", "full")},
    **{f"attention.scale {value}": at("attention", scale=value) for value in (0.3, 0.0)},
    **{f"attention.softcap {value}": at("attention", softcap=value) for value in (2.0, 0.0)},
    "positions.absolute": at("positions", absolute="learned"),
    "positions.offset": at("positions", offset=2),
    "positions.offset, absolute": at("positions", absolute="sinusoidal", offset=2),
    "positions.bias": at("positions", bias="t5", buckets=8, max_distance=16),
    "positions.scale_bias": at("positions", scale_bias=True),
    "positions.rope": at("positions", rope=None),
    **{f"layers[{index}].rotary local": local(index) for index in (0, 1)},
    **{f"layers[{index}].window": layer(index, window=3) for index in (0, 1)},
    **{f"layers[{index}].pattern": layer(index, pattern=Banded(width=2)) for index in (0, 1)},
    **{f"layers[{index}].input_norm": layer(index, input_norm=False) for index in (0, 1)},
    **{f"layers[{index}].mixer": layer(index, mixer="selective") for index in (0, 1)},
    **{f"layers[1].{name}": layer(1, **{name: 0}) for name in ("keys_from", "scores_from", "weights_from")},
    "num_key_value_heads": lambda config: replace(config, num_key_value_heads=2),
    "head_dim": lambda config: replace(config, head_dim=16),
    "intermediate_size": lambda config: replace(config, intermediate_size=16),
    "parallel": lambda config: replace(config, parallel="one_norm"),
    "head_bias": lambda config: replace(config, head_bias=True),
    "logit_scale": lambda config: replace(config, logit_scale=0.5),
    "logit_softcap": lambda config: replace(config, logit_softcap=2.0),
    "embedding.size": lambda config: replace(config, embedding=EmbeddingConfig(size=12), tie_word_embeddings=False),
    "embedding.size, tied": at("embedding", size=12),
    "embedding.scale": at("embedding", scale=2.0),
    "embedding.norm": at("embedding", norm=True),
    "embedding.token_types": at("embedding", token_types=2),
    "norm.kind": at("norm", kind="layer"),
    "norm.bias": at("norm", kind="layer", bias=True),
    "norm.unit_offset": at("norm", unit_offset=True),
    "norm.placement": at("norm", placement="sandwich"),
    "norm.final": at("norm", final=False),
    "norm.eps": at("norm", eps=0.1),
    "feed_forward.activation": at("feed_forward", activation="relu"),
    "feed_forward.gated": at("feed_forward", gated=False),
    "feed_forward.bias": at("feed_forward", bias=True),
}


@torch.inference_mode()
def fingerprint(config: ModelConfig) -> tuple[dict[str, torch.Size], torch.Tensor]:
    model = parts.randomised((Transformer if config.causal else Encoder)(config))
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    return {name: value.shape for name, value in model.state_dict().items()}, model(tokens)


@pytest.mark.parametrize("base", BASES)
def test_a_change_changes_weights_or_outputs_or_is_refused(base: str) -> None:
    shapes, out = fingerprint(BASES[base])
    ignored = []
    for name, change in CHANGES.items():
        try:
            changed = change(BASES[base])
            if changed == BASES[base]:
                continue
            after = fingerprint(changed)
        except (CheckpointError, RequestError):
            continue
        assert after[1].isfinite().all(), name
        if after[0] == shapes and after[1].shape == out.shape and torch.allclose(after[1], out, atol=1e-6):
            ignored.append(name)
    assert ignored == []


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        ("plain", at("attention", softcap=0.0), ["attention.softcap must be above 0"]),
        ("plain", lambda config: replace(config, logit_softcap=-1.0), ["logit_softcap must be above 0"]),
        ("plain", at("positions", offset=2), ["positions.offset", "positions.absolute"]),
        ("plain", at("positions", scale_bias=True), ["positions.scale_bias", "positions.bias"]),
        ("plain", at("embedding", size=0), ["embedding.size"]),
        ("latent", lambda config: replace(config, head_dim=16), ["head_dim (16)", "nope_dim"]),
        ("latent", lambda config: replace(config, num_key_value_heads=2), ["num_key_value_heads (2)"]),
        ("latent", at("attention", qk_norm="head"), ["attention.qk_norm"]),
        ("latent", layer(1, keys_from=0), ["layers[1].keys_from", "attention.latent"]),
        ("recurrent first", layer(1, keys_from=0), ["layers[1].keys_from", "layers[0]"]),
        ("recurrent first", layer(1, scores_from=0), ["layers[1].scores_from", "layers[0]"]),
        ("recurrent last", layer(1, scores_from=0), ["layers[1].scores_from", "'delta'"]),
        ("recurrent last", layer(1, window=4), ["layers[1].window", "'delta'"]),
        ("shared keys", layer(1, rotary="none"), ["layers[1].keys_from", "rotary"]),
        ("shared keys", layer(1, scores_from=0), ["keys_from and scores_from"]),
        ("shared scores", layer(1, window=4), ["layers[1].scores_from", "window"]),
        ("shared scores", at("attention", sinks=True), ["layers[1].scores_from", "attention.sinks"]),
        ("shared layers", layer(1, window=4), ["layers[1].weights_from", "layers[0]"]),
        (
            "recurrent first",
            lambda config: replace(
                config, layers=(LayerConfig(mixer="linear"),) * 2, positions=PositionConfig(bias="t5")
            ),
            ["positions.bias 't5'"],
        ),
    ],
)
def test_what_does_not_go_together_is_named(base: str, change: Change, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        change(BASES[base])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["num_experts", "top_k", "intermediate_size", "num_groups", "top_groups"])
def test_a_mixture_of_nothing_is_refused(name: str) -> None:
    wrong: Any = {name: 0}
    with pytest.raises(CheckpointError, match=f"moe.{name} must be a whole number of at least 1"):
        replace(parts.BASE, feed_forward=FeedForwardConfig(moe=replace(MIXTURE, **wrong)))


def test_a_memory_that_nobody_reads_is_refused() -> None:
    memory = StatesMemory(torch.zeros(3, 24), PackedCross([4], [3]))
    with pytest.raises(RequestError, match="no cross-attention"):
        Transformer(parts.BASE).hidden_states(
            torch.zeros(4, dtype=torch.long), None, PackedAttention([4]), memory=memory
        )


def test_heads_apply_what_they_are_given() -> None:
    embedding = torch.nn.Embedding(61, 24)
    capped = replace(parts.BASE, causal=False, logit_softcap=3.0)
    with pytest.raises(CheckpointError, match="logit_softcap"):
        build_head(capped, HeadConfig(kind="masked_lm", dense="gelu"), embedding)
    with pytest.raises(CheckpointError, match="logit_softcap"):
        Encoder(capped)
    with pytest.raises(CheckpointError, match="norm follows the dense layer"):
        HeadConfig(kind="sequence_classifier", labels=("a", "b"), norm=True)
    with pytest.raises(CheckpointError, match="has no labels"):
        HeadConfig(kind="replaced_token", dense="gelu", labels=("a", "b"))


def test_norms_keep_what_their_kind_has() -> None:
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        Transformer(replace(parts.BASE, norm=NormConfig(bias=True)))

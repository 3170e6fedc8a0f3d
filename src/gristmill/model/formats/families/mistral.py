"""Mistral, whose layers all see one window, and Mixtral, the same with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from gristmill.errors import CheckpointError
from gristmill.model.config import FeedForwardConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from gristmill.model.formats.families.experts import expert_entries
from gristmill.model.formats.families.llama import (
    attention_entries,
    decoder_ends,
    llama_entries,
    llama_fields,
    llama_sizes,
    tied_head,
)
from gristmill.model.formats.families.windows import same_window, write_window
from gristmill.model.formats.family import Family, Kind, Raw
from gristmill.model.formats.heads import decoder_heads
from gristmill.model.formats.mapping import Entry, same
from gristmill.model.formats.rope_fields import read_full_rope

_LENGTH = 131_072


def _read_mistral(raw: Raw) -> ModelConfig:
    sizes = llama_sizes(raw, kv_heads=8, length=_LENGTH)
    raw.only("hidden_act", "silu")
    return ModelConfig(
        **sizes,
        norm=NormConfig(eps=raw.default("rms_norm_eps", 1e-6)),
        positions=PositionConfig(rope=read_full_rope(raw, sizes["head_dim"])),
        layers=same_window(raw, sizes["num_hidden_layers"], 4096),
        tie_word_embeddings=raw.default("tie_word_embeddings", False),
    )


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return llama_fields(config) | write_window(config)


def _read_mixtral(raw: Raw) -> ModelConfig:
    sizes = llama_sizes(raw, kv_heads=8, length=_LENGTH)
    raw.only("hidden_act", "silu")
    moe = MoEConfig(
        num_experts=raw.default("num_local_experts", 8),
        top_k=raw.default("num_experts_per_tok", 2),
        intermediate_size=sizes["intermediate_size"],
    )
    return ModelConfig(
        **sizes,
        norm=NormConfig(eps=raw.default("rms_norm_eps", 1e-5)),
        feed_forward=FeedForwardConfig(moe=moe),
        positions=PositionConfig(rope=read_full_rope(raw, sizes["head_dim"], theta=1e6)),
        layers=same_window(raw, sizes["num_hidden_layers"], None),
        tie_word_embeddings=raw.default("tie_word_embeddings", False),
    )


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    moe = config.feed_forward.moe
    if moe is None:
        raise CheckpointError("mixtral needs a mixture of experts")
    fields = {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    return llama_fields(config) | write_window(config) | fields


def _mixtral_entries(config: ModelConfig, kind: Kind) -> list[Entry]:
    entries = decoder_ends(config)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        entries += same(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        entries += same(f"{ours}.feedforward_norm", f"{theirs}.post_attention_layernorm")
        entries += attention_entries(config, ours, theirs)
        entries += expert_entries(config, f"{ours}.mlp", f"{theirs}.block_sparse_moe", ("w1", "w3", "w2"))
    return entries


MISTRAL = Family(
    model_type="mistral",
    architectures={"MistralForCausalLM": "causal_lm", "MistralForSequenceClassification": "sequence_classifier"},
    read=_read_mistral,
    write=_write_mistral,
    entries=llama_entries,
    copies=tied_head,
    heads=decoder_heads(),
    derived=(".rotary_emb.inv_freq",),
)
MIXTRAL = Family(
    model_type="mixtral",
    architectures={"MixtralForCausalLM": "causal_lm"},
    read=_read_mixtral,
    write=_write_mixtral,
    entries=_mixtral_entries,
    copies=tied_head,
    derived=(".rotary_emb.inv_freq",),
)

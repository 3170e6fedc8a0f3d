"""Llama 1 to 3, SmolLM 1 and 2, and whatever else calls itself one."""

from __future__ import annotations

from typing import Any

from gristmill.errors import CheckpointError
from gristmill.model.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, PositionConfig
from gristmill.model.formats.family import Family, Kind, Raw
from gristmill.model.formats.heads import decoder_heads
from gristmill.model.formats.mapping import Entry, same, stacked
from gristmill.model.formats.rope_fields import read_rope, rope_keys


def llama_sizes(
    raw: Raw, *, kv_heads: int | None = None, head_dim: int | None = None, length: int = 2048
) -> dict[str, Any]:
    """The sizes that Llama and its descendants write alike, as ModelConfig fields.

    kv_heads, head_dim and length are a family's defaults for keys that are absent; None for as many heads as queries
    have, and for hidden_size / num_attention_heads.
    """
    hidden, heads = raw.need("hidden_size", int), raw.need("num_attention_heads", int)
    kv_heads = raw.nullable("num_key_value_heads", int, kv_heads)
    head_dim = raw.nullable("head_dim", int, head_dim)
    return {
        "vocab_size": raw.need("vocab_size", int),
        "hidden_size": hidden,
        "num_hidden_layers": raw.need("num_hidden_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hidden // max(heads, 1) if head_dim is None else head_dim,
        "intermediate_size": raw.need("intermediate_size", int),
        "max_position_embeddings": raw.default("max_position_embeddings", length),
        "initializer_range": raw.default("initializer_range", 0.02),
    }


def llama_fields(config: ModelConfig) -> dict[str, Any]:
    """The same back, with what follows from the rest of the configuration. Raises CheckpointError without rotation."""
    if config.positions.rope is None:
        raise CheckpointError("this family needs rotary positions")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.feed_forward.activation,
        **rope_keys(config.positions.rope, config.head_dim),
    }


def _read(raw: Raw) -> ModelConfig:
    sizes = llama_sizes(raw)
    raw.only("hidden_act", "silu")
    raw.only("pretraining_tp", 1)
    raw.only("rope_interleaved", False)
    raw.neutral("is_llama_config", "max_sequence_length")  # of SmolLM and of early conversions; no model reads them
    bias = raw.default("attention_bias", False)
    return ModelConfig(
        **sizes,
        norm=NormConfig(eps=raw.default("rms_norm_eps", 1e-6)),
        attention=AttentionConfig(qkv_bias=bias, output_bias=bias),
        feed_forward=FeedForwardConfig(bias=raw.default("mlp_bias", False)),
        positions=PositionConfig(rope=read_rope(raw, sizes["head_dim"])),
        tie_word_embeddings=raw.default("tie_word_embeddings", False),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    if config.positions.rope is None:
        raise CheckpointError("llama needs rotary positions")
    return llama_fields(config) | {
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": config.feed_forward.bias,
    }


def llama_entries(config: ModelConfig, kind: Kind) -> list[Entry]:
    """The table of Llama, which many families share."""
    entries = decoder_ends(config)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        entries += same(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        entries += same(f"{ours}.feedforward_norm", f"{theirs}.post_attention_layernorm")
        entries += attention_entries(config, ours, theirs)
        entries += gated_entries(config, f"{ours}.mlp", f"{theirs}.mlp")
    return entries


def decoder_ends(config: ModelConfig) -> list[Entry]:
    """Embedding, final norm and output head."""
    entries = same("embed_tokens", "model.embed_tokens") + same("norm", "model.norm")
    return entries if config.tie_word_embeddings else entries + same("lm_head", "lm_head")


def attention_entries(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """One matrix per projection there, one for all three here; norms of queries and keys where there are any."""
    parts, query, key = config.attention, config.query_size, config.key_value_size
    names = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
    entries = stacked(f"{ours}.self_attn.qkv_proj", names, (query, key, key), bias=parts.qkv_bias)
    entries += same(f"{ours}.self_attn.o_proj", f"{theirs}.self_attn.o_proj", bias=parts.output_bias)
    if parts.qk_norm is not None:
        entries += same(f"{ours}.self_attn.q_norm", f"{theirs}.self_attn.q_norm")
        entries += same(f"{ours}.self_attn.k_norm", f"{theirs}.self_attn.k_norm")
    return entries


def gated_entries(config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """The gated feed-forward layer: gate and up are one matrix here."""
    bias, sizes = config.feed_forward.bias, (config.intermediate_size,) * 2
    names = [f"{theirs}.gate_proj", f"{theirs}.up_proj"]
    entries = stacked(f"{ours}.gate_up_proj", names, sizes, bias=bias)
    return entries + same(f"{ours}.down_proj", f"{theirs}.down_proj", bias=bias)


def tied_head(config: ModelConfig, kind: Kind) -> dict[str, str]:
    """Some writers store the tied head once more."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


LLAMA = Family(
    model_type="llama",
    architectures={"LlamaForCausalLM": "causal_lm", "LlamaForSequenceClassification": "sequence_classifier"},
    read=_read,
    write=_write,
    entries=llama_entries,
    copies=tied_head,
    heads=decoder_heads(),
    derived=(".rotary_emb.inv_freq",),
)

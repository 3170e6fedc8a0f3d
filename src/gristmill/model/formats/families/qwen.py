"""Qwen 2 and 2.5 (biased projections), Qwen 3 (normed queries and keys), and Qwen 3's mixture of experts."""

from __future__ import annotations

from typing import Any

from gristmill.errors import CheckpointError
from gristmill.model.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from gristmill.model.formats.families.experts import expert_entries, is_sparse
from gristmill.model.formats.families.llama import (
    attention_entries,
    decoder_ends,
    gated_entries,
    llama_entries,
    llama_fields,
    llama_sizes,
    tied_head,
)
from gristmill.model.formats.families.windows import layer_entries, layer_windows, write_layer_types, write_window
from gristmill.model.formats.family import Family, Kind, Raw
from gristmill.model.formats.heads import decoder_heads
from gristmill.model.formats.mapping import Entry, same
from gristmill.model.formats.rope_fields import read_full_rope

_LENGTH = 32_768


def _read_qwen2(raw: Raw) -> ModelConfig:
    raw.only("use_mrope", False)
    return _model(
        raw,
        llama_sizes(raw, kv_heads=32, length=_LENGTH),
        AttentionConfig(qkv_bias=True),
        FeedForwardConfig(),
        _layers(raw),
    )


def _read_qwen3(raw: Raw) -> ModelConfig:
    sizes = llama_sizes(raw, kv_heads=32, head_dim=128, length=_LENGTH)
    return _model(raw, sizes, _normed_attention(raw), FeedForwardConfig(), _layers(raw))


def _read_qwen3_moe(raw: Raw) -> ModelConfig:
    sizes = llama_sizes(raw, kv_heads=4, length=_LENGTH)
    experts, local = raw.get("num_experts", int), raw.get("num_local_experts", int)
    if None not in (experts, local) and experts != local:
        raise raw.refuse("num_local_experts")
    moe = MoEConfig(
        num_experts=experts or local or 128,
        top_k=raw.default("num_experts_per_tok", 8),
        intermediate_size=raw.default("moe_intermediate_size", 768),
        normalise=raw.default("norm_topk_prob", False),
    )
    window = _used_window(raw)
    if window is None:
        raw.neutral("max_window_layers")
    else:  # all layers have the window, whatever this says
        raw.only("max_window_layers", 0)
    step, dense = raw.default("decoder_sparse_step", 1), raw.get("mlp_only_layers", list) or []
    if step < 1:
        raise raw.refuse("decoder_sparse_step")
    layers = layer_entries(
        LayerConfig(window=window, sparse=layer not in dense and (layer + 1) % step == 0)
        for layer in range(sizes["num_hidden_layers"])
    )
    return _model(raw, sizes, _normed_attention(raw), FeedForwardConfig(moe=moe), layers)


def _model(
    raw: Raw,
    sizes: dict[str, Any],
    attention: AttentionConfig,
    feed_forward: FeedForwardConfig,
    layers: tuple[LayerConfig, ...],
) -> ModelConfig:
    raw.only("hidden_act", "silu")
    return ModelConfig(
        **sizes,
        norm=NormConfig(eps=raw.default("rms_norm_eps", 1e-6)),
        attention=attention,
        feed_forward=feed_forward,
        positions=PositionConfig(rope=read_full_rope(raw, sizes["head_dim"])),
        layers=layers,
        tie_word_embeddings=raw.default("tie_word_embeddings", False),
    )


def _normed_attention(raw: Raw) -> AttentionConfig:
    bias = raw.default("attention_bias", False)
    return AttentionConfig(qkv_bias=bias, output_bias=bias, qk_norm="head")


def _used_window(raw: Raw) -> int | None:
    window = raw.nullable("sliding_window", int, 4096)
    return window if raw.default("use_sliding_window", False) else None


def _layers(raw: Raw) -> tuple[LayerConfig, ...]:
    """Without `layer_types`, the layers from max_window_layers on have the window."""
    window, first = _used_window(raw), raw.default("max_window_layers", 28)
    layers = raw.need("num_hidden_layers", int)
    windows = layer_windows(raw, layers, window, lambda layer: window is not None and layer >= first)
    return layer_entries(LayerConfig(window=each) for each in windows)


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return llama_fields(config) | _with_use(write_layer_types(config))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.attention.qkv_bias}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    moe = config.feed_forward.moe
    if moe is None:
        raise CheckpointError("qwen3_moe needs a mixture of experts")
    dense = [layer for layer in range(config.num_hidden_layers) if not config.layer(layer).sparse]
    return {
        **llama_fields(config),
        **_with_use(write_window(config)),
        "attention_bias": config.attention.qkv_bias,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def _with_use(window: dict[str, Any]) -> dict[str, Any]:
    return window | {"use_sliding_window": window["sliding_window"] is not None}


def _qwen3_moe_entries(config: ModelConfig, kind: Kind) -> list[Entry]:
    entries = decoder_ends(config)
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        entries += same(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        entries += same(f"{ours}.feedforward_norm", f"{theirs}.post_attention_layernorm")
        entries += attention_entries(config, ours, theirs)
        make = expert_entries if is_sparse(config, layer) else gated_entries
        entries += make(config, f"{ours}.mlp", f"{theirs}.mlp")
    return entries


QWEN2 = Family(
    model_type="qwen2",
    architectures={"Qwen2ForCausalLM": "causal_lm", "Qwen2ForSequenceClassification": "sequence_classifier"},
    read=_read_qwen2,
    write=_write_qwen2,
    entries=llama_entries,
    copies=tied_head,
    heads=decoder_heads(),
)
QWEN3 = Family(
    model_type="qwen3",
    architectures={"Qwen3ForCausalLM": "causal_lm", "Qwen3ForSequenceClassification": "sequence_classifier"},
    read=_read_qwen3,
    write=_write_qwen3,
    entries=llama_entries,
    copies=tied_head,
    heads=decoder_heads(),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": "causal_lm"},
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    entries=_qwen3_moe_entries,
    copies=tied_head,
)

"""Small GGUF files, written with the gguf library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gristmill.model.formats.llama_names import GGUF_LAYER, GGUF_TOP, split
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import train_bpe

CORPUS = ["Gristmills grind corn in 1234 turns, and more corn after that.", "naïve café 三十七"] * 3
GGUF_NAMES = {theirs: ours for ours, theirs in {**GGUF_LAYER, **GGUF_TOP}.items()}


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A trained tokenizer of exactly `vocab_size` ids or fewer."""
    return train_bpe(CORPUS, vocab_size)


def metadata(model: Transformer, tokens: Tokenizer) -> dict[str, Any]:
    """What a llama file says of itself."""
    config, backend = model.config, tokens.backend
    merges = json.loads(backend.to_str())["model"]["merges"]
    specials = set(tokens.special_tokens.values())
    count = tokens.vocab_size
    return {
        "general.architecture": "llama",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [backend.id_to_token(index) for index in range(count)],
        "tokenizer.ggml.token_type": [3 if index in specials else 1 for index in range(count)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokens.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokens.eos_token_id,
        "tokenizer.chat_template": tokens.chat_template,
    }


def tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The weights under GGUF names; rows of query and key interleaved as GGUF has them."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    out: dict[str, np.ndarray] = {}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, weight in split(state, config).items():
        parts = name.split(".")
        if name in GGUF_NAMES:
            out[GGUF_NAMES[name]] = weight.numpy()
            continue
        count = heads.get(parts[-2])
        if count is not None:
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        out[f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}.weight"] = weight.numpy()
    return out


def write(
    path: Path,
    fields: dict[str, Any],
    weights: dict[str, np.ndarray],
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a file. Values of None are left out; `quantised` applies to matrices whose rows it divides."""
    writer = gguf.GGUFWriter(path, arch="unused")
    writer.kv_data[0].clear()
    for key, value in fields.items():
        if value is not None:
            add(writer, key, value)
    for name, weight in weights.items():
        if quantised is not None and weight.ndim == 2:
            writer.add_tensor(name, gguf.quantize(weight, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata value under its natural type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def whole(path: Path, model: Transformer, **changes: Any) -> Path:
    """A complete file of a model, with metadata changed by key (dots as double underscores)."""
    fields = metadata(model, tokenizer(model.config.vocab_size))
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    return write(path, fields, tensors(model))


def dequantised(weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """A matrix after a round trip through a quantised type."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind))

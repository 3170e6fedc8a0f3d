"""GGUF files in: weights, tokenizer and chat template, through the `gguf` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.llama_names import GGUF_LAYER, GGUF_TOP, fuse
from gristmill.model.formats.state import load_state, meta_model
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """Read a model and its tokenizer. Quantised tensors are expanded to `dtype`.

    Raises CheckpointError for a broken file, another architecture, or a tokenizer that is not byte-level BPE.
    """
    reader = _open(path)
    config = _config(reader, path)
    model = meta_model(config)
    load_state(model, fuse(_tensors(reader, config, path), config, str(path)), dtype, str(path))
    return model, _tokenizer(reader, path)


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer alone."""
    return _tokenizer(_open(path), path)


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the library raises whatever its parsing runs into
        raise CheckpointError(f"{path}: not a readable GGUF file ({error})") from error


class _Fields:
    """Metadata of a GGUF file by key, with errors that name the key."""

    def __init__(self, reader: Any, path: Path) -> None:
        self.reader, self.path = reader, path

    def get(self, key: str, default: Any = None) -> Any:
        entry = self.reader.get_field(key)
        return default if entry is None else entry.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return value


def _config(reader: Any, path: Path) -> ModelConfig:
    fields = _Fields(reader, path)
    architecture = fields.need("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported (supported: 'llama')")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise CheckpointError(f"{path}: rotary scaling ({scaling}) is not supported")
    hidden, heads = fields.need("llama.embedding_length"), fields.need("llama.attention.head_count")
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(f"{path}: rotary positions on {rotated} of {head_dim} dimensions are not supported")
    return ModelConfig(
        vocab_size=len(fields.need("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        num_hidden_layers=fields.need("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.need("llama.feed_forward_length"),
        max_position_embeddings=fields.need("llama.context_length"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        rms_norm_eps=float(fields.need("llama.attention.layer_norm_rms_epsilon")),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _tensors(reader: Any, config: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    out: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _huggingface_name(tensor.name)
        if name is None:
            raise CheckpointError(f"{path}: tensor {tensor.name} has no place in a llama model")
        try:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except Exception as error:  # a type the library cannot expand, or a truncated file
            raise CheckpointError(f"{path}: tensor {tensor.name} cannot be read ({error})") from error
        if name.endswith("q_proj.weight"):
            weight = _unpermute(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _unpermute(weight, config.num_key_value_heads)
        out[name] = weight
    return out


def _huggingface_name(name: str) -> str | None:
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    parts = name.split(".")  # blk.<layer>.<kind>.weight
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in GGUF_LAYER:
        return f"model.layers.{parts[1]}.{GGUF_LAYER[parts[2]]}.{parts[3]}"
    return None


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection: GGUF interleaves the two halves of each head, we keep them apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _pre_tokenizer(kind: str, path: Path) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind in ("llama-bpe", "qwen2"):
        digits = r"\p{N}{1,3}" if kind == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise CheckpointError(f"{path}: tokenizer.ggml.pre {kind!r} is not supported")


def _tokenizer(reader: Any, path: Path) -> Tokenizer:
    fields = _Fields(reader, path)
    kind = fields.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(f"{path}: tokenizer.ggml.model {kind!r} is not supported (supported: 'gpt2')")
    tokens: list[str] = fields.need("tokenizer.ggml.tokens")
    types: list[int] = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(pair.split(" ", 1)) for pair in fields.need("tokenizer.ggml.merges")]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", "default"), path)
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    eos = fields.get("tokenizer.ggml.eos_token_id")
    stops = [eos, fields.get("tokenizer.ggml.eot_token_id"), *map(backend.token_to_id, ("<|im_end|>", "<|eot_id|>"))]
    return Tokenizer(
        backend=backend,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        stop_token_ids=tuple(dict.fromkeys(token for token in stops if token is not None)),
        chat_template=fields.get("tokenizer.chat_template"),
        add_bos_token=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    )

"""GGUF files in: weights, tokenizer and chat template, through the `gguf` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gristmill.errors import CheckpointError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.llama_names import GGUF_LAYER, GGUF_TOP, fuse
from gristmill.model.formats.state import load_state, meta_model
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gristmill.model.formats.gguf_reader import GGUFFile


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """Read a model and its tokenizer. Quantised tensors are expanded to `dtype`.

    Raises CheckpointError for a broken file, another architecture, or a tokenizer that is not byte-level BPE.
    """
    from gristmill.model.formats.gguf_reader import GGUFFile
    from gristmill.model.formats.gguf_tokenizer import read_tokenizer

    file = GGUFFile(path)
    config = _config(file)
    tokenizer = read_tokenizer(file)
    state = fuse(_Weights(file, config), config, str(path))
    model = meta_model(config)
    load_state(model, state, dtype, str(path))
    return model, tokenizer


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer alone."""
    from gristmill.model.formats.gguf_reader import GGUFFile
    from gristmill.model.formats.gguf_tokenizer import read_tokenizer

    return read_tokenizer(GGUFFile(path))


def _config(file: GGUFFile) -> ModelConfig:
    path = file.path
    architecture = file.need("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported (supported: 'llama')")
    scaling = file.get("llama.rope.scaling.type", str) or "none"
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise CheckpointError(f"{path}: rotary scaling ({scaling}) is not supported")
    hidden, heads = file.need("llama.embedding_length", int), file.need("llama.attention.head_count", int)
    head_dim = file.get("llama.attention.key_length", int) or hidden // max(heads, 1)
    rotated = file.get("llama.rope.dimension_count", int) or head_dim
    if rotated != head_dim:
        raise CheckpointError(f"{path}: rotary positions on {rotated} of {head_dim} dimensions are not supported")
    try:
        return ModelConfig(
            vocab_size=len(file.need_list("tokenizer.ggml.tokens", str)),
            hidden_size=hidden,
            num_hidden_layers=file.need("llama.block_count", int),
            num_attention_heads=heads,
            num_key_value_heads=file.get("llama.attention.head_count_kv", int) or heads,
            head_dim=head_dim,
            intermediate_size=file.need("llama.feed_forward_length", int),
            max_position_embeddings=file.need("llama.context_length", int),
            rope_theta=file.get("llama.rope.freq_base", float) or 10_000.0,
            rms_norm_eps=file.need("llama.attention.layer_norm_rms_epsilon", float),
            tie_word_embeddings="output.weight" not in file.tensors,
        )
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error


class _Weights(Mapping[str, torch.Tensor]):
    """Tensors of a file by Hugging Face name, expanded to float32 when asked for: one at a time is in memory."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._path = file.path
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._tensors = {_huggingface_name(name, file.path): tensor for name, tensor in file.tensors.items()}

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            # float32 needs no expansion: what comes back is the file itself, which must not be written to
            weight = torch.from_numpy(values if values.flags.writeable else values.copy())
            heads = self._heads.get(name.split(".")[-2])
            return weight if heads is None or weight.ndim != 2 else _unpermute(weight, heads)
        except Exception as error:  # a type the library cannot expand, or rows that are no heads
            raise CheckpointError(f"{self._path}: tensor {tensor.name} cannot be read ({error})") from error


def _huggingface_name(name: str, path: Path) -> str:
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    parts = name.split(".")  # blk.<layer>.<kind>.weight
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in GGUF_LAYER:
        return f"model.layers.{parts[1]}.{GGUF_LAYER[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{path}: tensor {name} has no place in a llama model")


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a rotary projection: GGUF interleaves the two halves of each head, we keep them apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

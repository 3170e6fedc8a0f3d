"""Find and load a model: an asset name, a Hugging Face directory, a GGUF file or one of our run directories."""

from __future__ import annotations

from pathlib import Path

import torch

from gristmill import assets
from gristmill.errors import AssetError, CheckpointError
from gristmill.model.formats.gguf_file import load_gguf, load_gguf_tokenizer
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path_or_name: str | Path, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """A model in evaluation mode and its tokenizer. `model(input_ids)` returns logits.

    An asset that is not in the cache is fetched. Raises CheckpointError for a broken checkpoint or an unknown dtype,
    AssetError for an unknown name.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve(path_or_name)
    if path.is_file():
        model, tokenizer = load_gguf(path, DTYPES[dtype])
    else:
        model, tokenizer = load_huggingface(path, DTYPES[dtype]), Tokenizer.load(path)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {model.config.vocab_size}"
            )
    return model.to(device).eval(), tokenizer


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer alone, from any of the places that `load_model` reads."""
    path = Path(path_or_name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    path = resolve(path_or_name)
    return load_gguf_tokenizer(path) if path.is_file() else Tokenizer.load(path)


def resolve(path_or_name: str | Path) -> Path:
    """The GGUF file or Hugging Face directory behind a path or an asset name."""
    path = Path(path_or_name)
    if not path.exists():
        try:
            path = assets.get(str(path_or_name))
        except AssetError as error:
            if path.suffix or len(path.parts) > 1:
                raise CheckpointError(f"{path}: no such file or directory") from error
            raise
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: neither a GGUF file nor a directory")
        return path
    for directory in (path, path / "export"):  # a run directory keeps its exported model there
        if (directory / "config.json").is_file():
            return directory
    raise CheckpointError(f"{path}: no model here (expected config.json, export/config.json or a .gguf file)")

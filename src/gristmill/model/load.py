"""Find and load a model: an asset name, a Hugging Face directory, a GGUF file or one of our run directories, also one
that `gristmill quantize` wrote."""

from __future__ import annotations

from pathlib import Path

import torch

from gristmill import assets
from gristmill.errors import AssetError, CheckpointError
from gristmill.model.config import EncoderDecoderConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.gguf.load import load_gguf, load_gguf_tokenizer
from gristmill.model.formats.huggingface import Model, is_quantised, load_huggingface, read_object
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path_or_name: str | Path, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """A model in evaluation mode and its tokenizer. `model(input_ids)` returns logits.

    An asset that is not in the cache is fetched. Raises CheckpointError for a broken checkpoint, an unknown dtype or a
    model that is no decoder, AssetError for an unknown name.
    """
    model, tokenizer = load_any(path_or_name, dtype=dtype, device=device)
    if not isinstance(model, Transformer) or model.config.cross_attention:
        raise CheckpointError(f"{path_or_name}: not a decoder that generates by itself, but {_instead(model)}")
    return model, _present(tokenizer, path_or_name)


def load_generator(
    path_or_name: str | Path, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[Transformer | EncoderDecoder, Tokenizer]:
    """A model that generates, a decoder or an encoder-decoder, and its tokenizer. Raises as `load_model`."""
    model, tokenizer = load_any(path_or_name, dtype=dtype, device=device)
    if isinstance(model, EncoderDecoder) or (isinstance(model, Transformer) and not model.config.cross_attention):
        return model, _present(tokenizer, path_or_name)
    raise CheckpointError(f"{path_or_name}: not a model that generates, but {_instead(model)}")


def _present(tokenizer: Tokenizer | None, where: str | Path) -> Tokenizer:
    if tokenizer is None:
        raise CheckpointError(f"{where}: no tokenizer beside the model")
    return tokenizer


def load_any(
    path_or_name: str | Path, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[Model, Tokenizer | None]:
    """A model of any kind in evaluation mode, and its tokenizer if there is one beside it. Raises as `load_model`."""
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve(path_or_name)
    if path.is_file():
        model, tokenizer = load_gguf(path, DTYPES[dtype])
        return model.to(device).eval(), tokenizer
    if is_quantised(read_object(path / "config.json")):
        from gristmill.model.quantised.load import load_quantised

        return load_quantised(path, dtype=dtype, device=device)
    model = load_huggingface(path, DTYPES[dtype]).to(device).eval()
    if not (path / "tokenizer.json").is_file():
        return model, None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > vocabulary(model):
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {vocabulary(model)}"
        )
    return model, tokenizer


def vocabulary(model: Model) -> int:
    """Rows of the input embedding."""
    config = model.config
    return config.encoder.vocab_size if isinstance(config, EncoderDecoderConfig) else config.vocab_size


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer alone, from any of the places that `load_model` reads."""
    path = Path(path_or_name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    path = resolve(path_or_name)
    return load_gguf_tokenizer(path) if path.is_file() else Tokenizer.load(path)


def _instead(model: Model) -> str:
    """What a model is that cannot generate, and who takes it."""
    if isinstance(model, EncoderDecoder | Transformer):
        return "the decoder of an encoder: load it with gristmill.model.load.load_any and call it with both inputs"
    what = "an encoder" if isinstance(model, Encoder) else f"an encoder with a head ({model.head_config.kind})"
    return (
        f"{what}: take gristmill.model.sentence.SentenceEncoder for vectors of texts, "
        "gristmill.model.load.load_any for the model itself"
    )


def resolve(path_or_name: str | Path) -> Path:
    """The GGUF file or Hugging Face directory behind a path or an asset name."""
    path = Path(path_or_name)
    if not path.exists():
        try:
            path = assets.get(str(path_or_name))
        except AssetError as error:
            if path.suffix or any(mark in str(path_or_name) for mark in "/\\"):
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

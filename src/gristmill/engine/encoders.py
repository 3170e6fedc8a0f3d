"""Encoders behind the front of the engine: texts to vectors. They have no next token, so no scheduler and no cache."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.config import ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.formats.huggingface import is_quantised, read_config, read_object
from gristmill.model.heads import Headed
from gristmill.model.load import DTYPES, load_any, resolve
from gristmill.model.sentence import SentenceEncoder


def is_encoder(model: str | Path) -> bool:
    """Whether a name is that of an encoder alone, which cannot generate. Raises as loading does."""
    path = resolve(model)
    if path.is_file():
        return False
    at = path / "config.json"
    values = read_object(at)
    if is_quantised(values):
        return False
    _, _, config = read_config(values, str(at))
    return isinstance(config, ModelConfig) and not config.causal


def load_sentence_encoder(model: str | Path, *, dtype: str = "float32", device: str = "cpu") -> SentenceEncoder:
    """An encoder that gives unit vectors: pooled as its directory says, by the mean where it does not say.

    Raises CheckpointError for a broken checkpoint, an unknown dtype, or an encoder without a tokenizer.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve(model)
    if (path / "modules.json").is_file():
        found = SentenceEncoder.load(path, dtype=DTYPES[dtype])
    else:
        built, tokenizer = load_any(path, dtype=dtype)
        body = built.body if isinstance(built, Headed) else built
        if not isinstance(body, Encoder) or tokenizer is None:
            raise CheckpointError(f"{path}: {'no tokenizer beside the model' if tokenizer is None else 'no encoder'}")
        found = SentenceEncoder(body, tokenizer)
    found.encoder.to(torch.device(device))
    found.normalise = True
    found.widths = _widths(path / "config.json", found.size)
    return found


def shorten(vectors: np.ndarray, dimensions: int | None, allowed: Collection[int]) -> np.ndarray:
    """The first `dimensions` values of unit vectors (texts, size), at unit length again; None keeps them all.

    Raises RequestError unless the model was trained to be cut there: its config.json says `is_matryoshka`, or lists
    `matryoshka_dimensions`. Source: Kusupati et al. 2022.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    if dimensions not in allowed:
        few = "" if len(allowed) > 16 else f" ({', '.join(map(str, sorted(allowed)))})"
        raise RequestError(
            f"dimensions = {dimensions}: the model's vectors have {vectors.shape[1]} values and are not made to be cut "
            f"there{few}",
            field="dimensions",
        )
    cut = vectors[:, :dimensions]
    shortened: np.ndarray = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return shortened


def _widths(at: Path, size: int) -> Collection[int]:
    values = read_object(at)
    listed = values.get("matryoshka_dimensions")
    if listed is None:
        return range(1, size + 1) if values.get("is_matryoshka") else (size,)
    if not isinstance(listed, list) or not all(type(width) is int and 0 < width <= size for width in listed):
        raise CheckpointError(f"{at}: matryoshka_dimensions = {listed!r} are no widths up to {size}")
    return {*listed, size}

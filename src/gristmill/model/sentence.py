"""Sentence embeddings: an encoder, pooling and normalisation, as directories of sentence-transformers hold them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gristmill.core import Prompt
from gristmill.errors import CheckpointError, DataError, RequestError
from gristmill.files import atomic_directory, write_json
from gristmill.model.encoder import Encoder
from gristmill.model.formats.huggingface import load_huggingface, read_object, save_huggingface
from gristmill.model.heads import Headed, Pooling, pool
from gristmill.model.load import resolve
from gristmill.tokens.tokenizer import Tokenizer

_FLAGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_KINDS = "sentence_transformers.models"


class SentenceEncoder:
    """Texts to vectors. Two texts are alike as far as the cosine of their vectors is near 1.

    max_tokens: texts are cut to so many tokens, special ones included; None for what the positions allow.
    normalise: vectors have length 1. lower_case: texts are lowered before all else.

    Source: Reimers and Gurevych 2019.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling = "mean",
        normalise: bool = True,
        max_tokens: int | None = None,
        lower_case: bool = False,
    ) -> None:
        limit = encoder.config.max_position_embeddings
        special = tokenizer.backend.num_special_tokens_to_add(is_pair=False)
        self.max_tokens = limit if max_tokens is None else max_tokens
        if not special < self.max_tokens <= limit:
            raise CheckpointError(f"max_tokens must be above {special} and at most {limit}, got {max_tokens}")
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {encoder.config.vocab_size}"
            )
        self.encoder, self.tokenizer = encoder.eval(), tokenizer
        self.pooling, self.normalise, self.lower_case = pooling, normalise, lower_case
        self.widths: Collection[int] = (self.size,)
        """Widths to which the vectors may be cut: more than one only where the model was trained for it."""

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return self.encoder.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: Sequence[Prompt], batch_size: int = 32, *, truncate: bool = True) -> np.ndarray:
        """One vector per text (or list of token ids), in order: float32 (texts, size). Texts of similar length share a
        batch.

        A text of more than `max_tokens` is cut there, and a warning counts those; with truncate False it is a
        RequestError. Raises DataError for text with half of a surrogate pair.
        """
        if isinstance(texts, str):
            raise RequestError("texts must be a list of texts, not one text", field="texts")
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}", field="batch_size")
        ids, lengths = self.token_ids(texts, self.max_tokens if truncate else None)
        if long := sum(length > self.max_tokens for length in lengths):
            warnings.warn(f"{long} of {len(texts)} texts were cut to {self.max_tokens} tokens", stacklevel=2)
        out = np.empty((len(texts), self.size), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            out[rows] = self._vectors([ids[row] for row in rows])
        return out

    def token_ids(self, texts: Sequence[Prompt], max_tokens: int | None = None) -> tuple[list[list[int]], list[int]]:
        """The ids of each text, cut so that `max_tokens` are left, special ones included, and how many it has uncut.

        None refuses what is longer than the encoder's own limit. Ids are taken as they are. Raises RequestError and
        DataError, naming the text.
        """
        special = self.tokenizer.backend.num_special_tokens_to_add(is_pair=False)
        limit = self.max_tokens if max_tokens is None else max_tokens
        if not special < limit <= self.max_tokens:
            raise RequestError(
                f"max_tokens must be above {special} and at most {self.max_tokens}, got {max_tokens}",
                field="max_tokens",
            )
        plain = [text for text in texts if isinstance(text, str)]
        lowered = [text.lower() for text in plain] if self.lower_case else plain
        framed = zip(*self.tokenizer.encode_framed(lowered, limit), strict=True)
        rows = [next(framed) if isinstance(text, str) else (list(text[:limit]), len(text)) for text in texts]
        for index, (ids, length) in enumerate(rows):
            if max_tokens is None and length > limit:
                raise RequestError(f"text {index} has {length} tokens, at most {limit} fit", field="texts")
            if not ids:
                raise DataError(f"text {index} has no token: {texts[index]!r}")
            if not 0 <= min(ids) <= max(ids) < self.encoder.config.vocab_size:
                raise RequestError(f"text {index} has ids that are not in the vocabulary", field="texts")
        return [ids for ids, _ in rows], [length for _, length in rows]

    def _vectors(self, ids: list[list[int]]) -> np.ndarray:
        device = self.encoder.embed_tokens.weight.device
        mask = torch.zeros(len(ids), max(len(row) for row in ids), dtype=torch.long, device=device)
        tokens = torch.zeros_like(mask)
        for row, values in enumerate(ids):
            tokens[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        pooled = pool(self.encoder(tokens, mask), mask, self.pooling).float()
        found: np.ndarray = (F.normalize(pooled, dim=-1) if self.normalise else pooled).cpu().numpy()
        return found

    def save(self, directory: Path) -> None:
        """Write a directory that sentence-transformers and `load` read. Raises CheckpointError for an encoder that no
        known family of checkpoints can hold."""
        flags: dict[str, Any] = {flag: self.pooling == how for flag, how in _FLAGS.items()}
        parts = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * self.normalise)]
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"{_KINDS}.{kind}"}
            for index, (kind, path) in enumerate(parts)
        ]
        with atomic_directory(directory) as temporary:
            save_huggingface(self.encoder, temporary)
            self.tokenizer.save(temporary)
            write_json(temporary / "modules.json", modules)
            limits = {"max_seq_length": self.max_tokens, "do_lower_case": self.lower_case}
            write_json(temporary / "sentence_bert_config.json", limits)
            for _, path in parts[1:]:
                (temporary / path).mkdir()
            write_json(temporary / "1_Pooling/config.json", {"word_embedding_dimension": self.size, **flags})

    @classmethod
    def load(cls, path_or_name: str | Path, *, dtype: torch.dtype = torch.float32) -> SentenceEncoder:
        """Read a directory of sentence-transformers, or an asset of that form.

        Raises CheckpointError, naming the file and key, for a part or a way of pooling that is not supported.
        """
        directory = resolve(path_or_name)
        if not (directory / "modules.json").is_file():
            raise CheckpointError(
                f"{directory}: modules.json is missing; build a SentenceEncoder from an encoder and a tokenizer instead"
            )
        transformer, pooling, normalise = _modules(directory)
        settings = directory / "config_sentence_transformers.json"
        if settings.is_file() and read_object(settings).get("default_prompt_name") is not None:
            raise CheckpointError(f"{settings}: default_prompt_name is not supported; put the prompt before each text")
        model = load_huggingface(transformer, dtype)
        encoder = model.body if isinstance(model, Headed) else model
        if not isinstance(encoder, Encoder):
            raise CheckpointError(f"{transformer}: not an encoder, but {type(encoder).__name__}")
        limits_at = transformer / "sentence_bert_config.json"
        limits = read_object(limits_at) if limits_at.is_file() else {}
        length = limits.get("max_seq_length")
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise CheckpointError(f"{limits_at}: max_seq_length = {length!r} is no whole number")
        if unknown := sorted(set(limits) - {"max_seq_length", "do_lower_case"}):
            raise CheckpointError(f"{limits_at}: {unknown[0]} = {limits[unknown[0]]!r} is not supported")
        return cls(
            encoder,
            Tokenizer.load(transformer),
            pooling=_pooling(pooling / "config.json", encoder.config.hidden_size),
            normalise=normalise,
            max_tokens=length,
            lower_case=bool(limits.get("do_lower_case")),
        )


def _modules(directory: Path) -> tuple[Path, Path, bool]:
    """Where the encoder and the pooling lie, and whether vectors are normalised."""
    path = directory / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        places = [PurePosixPath(str(module["path"])) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a list of modules ({error})") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(f"{path}: modules {kinds} are not supported (Transformer, Pooling and maybe Normalize)")
    for place in places:
        if place.is_absolute() or ".." in place.parts:
            raise CheckpointError(f"{path}: {place} lies outside the directory")
    return directory / places[0], directory / places[1], len(kinds) == 3


def _pooling(path: Path, size: int) -> Pooling:
    values = read_object(path)
    width = values.get("word_embedding_dimension", values.get("embedding_dimension", size))
    if width != size:
        raise CheckpointError(f"{path}: word_embedding_dimension = {width!r}, but the encoder has {size}")
    asked = [name for name, value in values.items() if name.startswith("pooling_mode_") and value]
    if len(asked) == 1 and asked[0] in _FLAGS:
        return _FLAGS[asked[0]]
    mode = values.get("pooling_mode")
    if not asked and isinstance(mode, str) and mode in _MODES:
        return _MODES[mode]
    raise CheckpointError(f"{path}: pooling {asked or mode!r} is not supported (one of {', '.join(_FLAGS)})")

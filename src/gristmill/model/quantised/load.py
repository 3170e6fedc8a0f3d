"""Load a decoder with quantised layers, one stored tensor at a time: the whole model is never floating in memory.

From a Hugging Face directory or a GGUF file matrices are rounded to nearest as they are read. GGUF blocks are expanded
and rounded again, but for Q4_0, which scheme int4 with groups of 32 keeps as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError, RequestError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.gguf.load import open_gguf
from gristmill.model.formats.gguf.tensors import GGUFTensors
from gristmill.model.formats.heads import StoredTensors
from gristmill.model.formats.huggingface import is_quantised, read_config, read_object
from gristmill.model.formats.mapping import Entry, Rows, check_stored, checked_part, part_shapes
from gristmill.model.formats.safetensors_file import ShardedTensors
from gristmill.model.formats.state import on_meta
from gristmill.model.load import DTYPES, resolve
from gristmill.model.quantised.checkpoint import fill, read_quantised
from gristmill.model.quantised.linear import Int8Embedding, build_linear
from gristmill.model.quantised.quantise import EMBEDDING, HEAD
from gristmill.model.quantised.weights import (
    Bits,
    Int4Weight,
    Int8Weight,
    Scheme,
    Weight,
    bits_of,
    check_embedding,
    check_scheme,
    join,
    round_to_nearest,
)
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer

Q4_0_GROUP = 32
"""Values of a GGUF block, which share a scale."""


def load_quantised(
    path_or_name: str | Path,
    scheme: Scheme | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    group_size: int = 32,
    head: bool = True,
    embedding: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """A decoder in evaluation mode whose `nn.Linear` layers are quantised, and its tokenizer.

    dtype: of what is not quantised, and of the activations. group_size, head, embedding: see `quantise_model`. Of a
    directory that `save_quantised` wrote, scheme must be what it holds (int8 and w8a8 hold the same; None takes it),
    group_size and head are as stored, and with embedding=False an embedding of eight bits is expanded.

    Raises RequestError naming an option, CheckpointError for a broken checkpoint, a model that is no decoder, a weight
    that is not finite or a scheme that a quantised checkpoint does not hold, AssetError for an unknown name.
    """
    check_scheme("int8" if scheme is None else scheme, group_size)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = resolve(path_or_name)
    values, tensors, tokenizer = _open(path)
    if is_quantised(values):
        model = read_quantised(path, scheme, DTYPES[dtype], embedding=embedding)
    elif scheme is None:
        raise RequestError(f"{path}: its weights are floating; name a scheme to quantise them to", field="scheme")
    else:
        with _one_thread():
            model = _Reader(values, tensors, DTYPES[dtype], str(path)).read(scheme, group_size, head, embedding)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {model.config.vocab_size}"
        )
    return model.to(device).requires_grad_(False).eval(), tokenizer


def _open(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor], Tokenizer]:
    if path.is_file():
        checkpoint = open_gguf(path)
        return checkpoint.config, checkpoint.tensors, checkpoint.tokenizer
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path}: no tokenizer beside the model")
    return read_object(path / "config.json"), ShardedTensors(path), Tokenizer.load(path)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Slabs are small: two threads gain a tenth, and on a busy machine wait ten times as long for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Reader:
    """Fills a decoder on the meta device from the floating (or GGUF) tensors of a checkpoint."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype, at: str) -> None:
        family, kind, config = read_config(values, at)
        if kind != "causal_lm" or not isinstance(config, ModelConfig) or config.cross_attention:
            raise CheckpointError(f"{at}: only decoders that generate by themselves are quantised, this is a {kind}")
        self.model = on_meta(lambda: Transformer(config))
        self.entries = list(family.entries(config, kind))
        self.gguf = tensors if isinstance(tensors, GGUFTensors) else None
        self.tensors = StoredTensors(tensors, family, self.entries, at)
        self.dtype, self.at = dtype, at
        check_stored(self.tensors, self.entries, at, family.copies(config, kind), family.derived)

    def read(self, scheme: Scheme, group_size: int, head: bool, embedding: bool) -> Transformer:
        """The model, its layers quantised."""
        model = self.model
        check_embedding(model.config.tie_word_embeddings, head, embedding)
        own_head = head and model.config.tie_word_embeddings
        buffers = {name for name, _ in model.named_buffers()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        state: dict[str, Tensor] = {}
        for entry in self.entries:
            name, _, leaf = entry.ours.rpartition(".")
            layer, parts = model.get_submodule(name), part_shapes(entry, shapes[entry.ours])
            if leaf == "weight" and type(layer) is nn.Linear and (head or name != HEAD):
                bits = 8 if name == HEAD else bits_of(scheme, layer.in_features, group_size)
                weight = self._rounded(entry, parts, bits, group_size)
                model.set_submodule(name, build_linear(weight, layer.bias, scheme))
                continue
            whole = entry.layout.join([self._part(*part) for part in parts])
            if name == EMBEDDING and (embedding or own_head):
                rows = self._checked(entry.ours, whole, 8, group_size)
                assert isinstance(rows, Int8Weight)
                if own_head:
                    model.set_submodule(HEAD, build_linear(rows, model.lm_head.bias, scheme))
                if embedding:
                    model.set_submodule(EMBEDDING, Int8Embedding(rows, self.dtype))
                    continue
            state[entry.ours] = whole.to(torch.float32 if entry.ours in buffers else self.dtype).contiguous()
        fill(model, state, self.at)
        return model

    def _rounded(self, entry: Entry, parts: list[tuple[str, tuple[int, ...]]], bits: Bits, group_size: int) -> Weight:
        """One of our matrices: part by part where their rows are stacked, so that no more is floating at once."""
        if not isinstance(entry.layout, Rows):
            whole = entry.layout.join([self._part(*part) for part in parts])
            return self._checked(entry.ours, whole, bits, group_size)
        return join([self._rounded_part(name, shape, bits, group_size) for name, shape in parts])

    def _rounded_part(self, name: str, shape: tuple[int, ...], bits: Bits, group_size: int) -> Weight:
        if self.gguf is not None and bits == 4 and group_size == Q4_0_GROUP and self.gguf.shape(name) == shape:
            stored = self.gguf.int4(name)
            if stored is not None and bool(stored[1].isfinite().all()):
                return Int4Weight(*stored)
        return self._checked(name, self._part(name, shape), bits, group_size)

    def _part(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return checked_part(self.tensors, name, shape, self.at)

    def _checked(self, name: str, values: Tensor, bits: Bits, group_size: int) -> Weight:
        try:
            return round_to_nearest(values, bits, group_size)
        except CheckpointError as error:
            raise CheckpointError(f"{self.at}: {name}: {error}") from error

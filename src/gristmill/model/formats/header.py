"""What a checkpoint says of itself before a single weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from gristmill.errors import CheckpointError
from gristmill.model.formats.family import Config, Family, Kind
from gristmill.model.formats.heads import model_entries
from gristmill.model.formats.huggingface import is_quantised, module_for, read_model, read_object
from gristmill.model.formats.safetensors_file import ShardedTensors
from gristmill.model.formats.state import on_meta
from gristmill.model.heads import HeadConfig

_GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. kind: its type, as torch or GGUF call it."""

    kind: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checkpoint without its weights. values: its config.json, or what that of a GGUF file would be."""

    path: Path
    values: Mapping[str, Any]
    family: Family
    kind: Kind
    config: Config
    head: HeadConfig | None
    tensors: Mapping[str, Stored]

    @property
    def architecture(self) -> str:
        """Its class in transformers."""
        return str((self.values.get("architectures") or [self.family.architecture(self.kind)])[0])

    @property
    def is_gguf(self) -> bool:
        """A GGUF file rather than a Hugging Face directory."""
        return self.path.is_file()

    @cached_property
    def parameters(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return on_meta(lambda: module_for(self.config, self.kind, self.head)).count_parameters()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def types(self) -> dict[str, tuple[int, int]]:
        """Type -> number of tensors and their bytes, the most bytes first."""
        count = Counter(tensor.kind for tensor in self.tensors.values())
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.kind] += tensor.nbytes
        return {kind: (count[kind], size) for kind, size in sizes.most_common()}

    def lossless_dtype(self) -> str:
        """The narrowest of float32, bfloat16 and float16 that holds every stored weight as it is; buffers, which stay
        float32 in any model, do not count.

        Raises CheckpointError when none of the three does.
        """
        if self.is_gguf:  # a quantised block is a 16-bit scale times whole numbers
            found = {_GGUF_FLOATS.get(tensor.kind, torch.float32) for tensor in self.tensors.values()}
        else:
            buffers = self._buffers()
            found = {getattr(torch, tensor.kind) for name, tensor in self.tensors.items() if name not in buffers}
            found = {dtype for dtype in found if dtype.is_floating_point}
        widest = reduce(torch.promote_types, found) if all(dtype.itemsize > 1 for dtype in found) else None
        if widest not in (torch.float32, torch.bfloat16, torch.float16):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise CheckpointError(
                f"{self.path}: weights are stored as {names}, which none of float32, bfloat16 and float16 keeps. "
                "Name one with --dtype."
            )
        return str(widest).removeprefix("torch.")

    def _buffers(self) -> set[str]:
        model = on_meta(lambda: module_for(self.config, self.kind, self.head))
        names = {name for name, _ in model.named_buffers()}
        entries = model_entries(self.family, model, self.kind)
        return {stored for entry in entries if entry.ours in names for stored in entry.theirs}


def read_header(path: Path) -> Header:
    """Read config.json and the headers of the weights, or the head of a GGUF file.

    Raises CheckpointError, naming file and key, for what is missing, broken or not supported.
    """
    if path.is_file():
        return _read_gguf(path)
    values = read_object(path / "config.json")
    if is_quantised(values) and isinstance(values.get("model"), dict):
        values = values["model"]
    weights = ShardedTensors(path)
    found = read_model(values, list(weights), str(path / "config.json"))
    tensors = {}
    for name in weights:
        shape, dtype = weights.shape(name), weights.dtype(name)
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = Stored(str(dtype).removeprefix("torch."), shape, size)
    return Header(path, values, *found, tensors)


def _read_gguf(path: Path) -> Header:
    from gristmill.model.formats.gguf.metadata import read_architecture, read_config
    from gristmill.model.formats.gguf.reader import GGUFFile
    from gristmill.model.formats.gguf.tensors import GGUFTensors

    file = GGUFFile(path)
    architecture = read_architecture(file)
    values = read_config(file, architecture)
    found = read_model(values, list(GGUFTensors(file, architecture, values)), str(path))
    tensors = {name: Stored(info.kind.name, info.shape, info.nbytes) for name, info in file.tensors.items()}
    return Header(path, values, *found, tensors)

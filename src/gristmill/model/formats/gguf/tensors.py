"""The tensors of a GGUF file under their Hugging Face names, each expanded when it is asked for; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.formats.gguf.architectures import ROPE_TENSORS, Architecture
from gristmill.model.formats.gguf.blocks import dtype_of, read_int4, read_rows
from gristmill.model.formats.gguf.reader import GGUFFile, TensorInfo


class _Source(NamedTuple):
    tensor: TensorInfo
    expert: int | None


class GGUFTensors(Mapping[str, Tensor]):
    """Hugging Face name -> tensor, in memory of its own: quantised ones as float32, others in their own type.

    `config` is what `read_config` gave. Raises CheckpointError naming a tensor that the architecture does not have
    or whose type is not supported.
    """

    def __init__(self, file: GGUFFile, architecture: Architecture, config: Mapping[str, Any]) -> None:
        self._file, self._architecture = file, architecture
        self._heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._sources: dict[str, _Source] = {}
        scaled = config["rope_parameters"].get("rope_type", "default") != "default"
        for tensor in file.tensors.values():
            if scaled and tensor.name in ROPE_TENSORS.values():  # it is in the configuration
                continue
            dtype_of(file, tensor)
            experts: list[int | None] = [None]
            if architecture.has_experts(tensor.name):
                experts = list(range(tensor.shape[0]))
            for expert in experts:
                name = architecture.huggingface_name(tensor.name, expert)
                if name is None:
                    raise CheckpointError(
                        f"{file.path}: tensor {tensor.name} has no place in a {architecture.model_type} model"
                    )
                self._sources[name] = _Source(tensor, expert)

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> Tensor:
        tensor, expert = self._sources[name]
        out = torch.empty(self.shape(name), dtype=dtype_of(self._file, tensor))
        read_rows(self._file, tensor, out, expert or 0)
        if offset := self._architecture.norm_offset(name):
            out -= offset
        return self._turned(name, out)

    def int4(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A Q4_0 matrix as it is stored, see `read_int4`, or None for one of another type."""
        tensor, expert = self._sources[name]
        if tensor.kind != GGMLQuantizationType.Q4_0 or expert is not None or len(tensor.shape) != 2:
            return None
        packed, scale = read_int4(self._file, tensor)
        return self._turned(name, packed), self._turned(name, scale)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        tensor, expert = self._sources[name]
        return tensor.shape if expert is None else tensor.shape[1:]

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        heads = self._architecture.rotated_heads(name, *self._heads)
        if heads is None:
            return rows
        if rows.shape[0] % (2 * heads):
            stored = self._sources[name].tensor.name
            raise CheckpointError(f"{self._file.path}: tensor {stored} has {rows.shape[0]} rows for {heads} heads")
        return apart(rows, heads)


def apart(weight: Tensor, heads: int) -> Tensor:
    """Rows (or values) of a rotary projection from pair by pair, as GGUF has them, to the halves of each head."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def paired(weight: Tensor, heads: int) -> Tensor:
    """The same back."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

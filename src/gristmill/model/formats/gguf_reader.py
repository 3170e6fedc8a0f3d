"""Metadata and tensors of a GGUF file, with what a broken or hostile file can do caught at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader, GGUFValueType

from gristmill.errors import CheckpointError

_T = TypeVar("_T")
_ARRAY = int(GGUFValueType.ARRAY)
_LONGEST_ARRAY = 1 << 22
"""Entries of a metadata array: many times any vocabulary. The library makes an object of each."""


class _Reader(GGUFReader):  # type: ignore[misc]
    """The library's reader over a plain array, whose slices cost a third of a memmap's, and which ends where it ends:
    the library's own slices just get shorter, so that a false length makes it loop without end."""

    @property
    def data(self) -> np.ndarray:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self._bytes):
            raise ValueError(f"it has {len(self._bytes)} bytes, but announces {end} or more")
        part: np.ndarray = super()._get(offset, dtype, count, override_order)
        return part

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == _ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > _LONGEST_ARRAY:
                raise ValueError(f"a metadata array of {length} entries is longer than any vocabulary")
        return super()._get_field_parts(orig_offs, raw_type)


class GGUFFile:
    """An open GGUF file. Raises CheckpointError when it is broken, cut off or not a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        except Exception as error:  # the library raises whatever its parsing runs into
            raise CheckpointError(f"{path}: not a readable GGUF file ({error})") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """A metadata value, or None. Raises CheckpointError, naming the key, when it is of another type."""
        value = self._contents(key)
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: metadata {key!r} is not of type {kind.__name__}")
        return value

    def need(self, key: str, kind: type[_T]) -> _T:
        """The same, and CheckpointError when the key is missing."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return value

    def get_list(self, key: str, kind: type[_T]) -> list[_T] | None:
        """A metadata array, or None. Raises CheckpointError as `get` does."""
        values = self.get(key, list)
        if values is not None and not all(isinstance(value, kind) for value in values):
            raise CheckpointError(f"{self.path}: metadata {key!r} is not a list of type {kind.__name__}")
        return values

    def need_list(self, key: str, kind: type[_T]) -> list[_T]:
        """The same, and CheckpointError when the key is missing."""
        values = self.get_list(key, kind)
        if values is None:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing")
        return values

    def _contents(self, key: str) -> Any:
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: metadata {key!r} is not UTF-8 ({error})") from error

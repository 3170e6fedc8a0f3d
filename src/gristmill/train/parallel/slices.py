"""Which part of a weight a process of a tensor or expert group holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A part of `dim`, of each of its sections: a fused matrix (queries, keys, values) is split section by section.

    over: the dimension of the mesh. Sections that do not divide give the first parts one row more.
    """

    over: str
    dim: int
    sections: tuple[int, ...]

    def take(self, whole: Tensor, part: int, parts: int) -> Tensor:
        """What `part` of `parts` holds, a copy."""
        pieces = [section.tensor_split(parts, self.dim)[part] for section in whole.split(self.sections, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole of all parts, in order."""
        sizes = [self.sizes(part, len(slices)) for part in range(len(slices))]
        pieces = [held.split(own, self.dim) for held, own in zip(slices, sizes, strict=True)]
        return torch.cat([piece[section] for section in range(len(self.sections)) for piece in pieces], self.dim)

    def sizes(self, part: int, parts: int) -> list[int]:
        """Rows of each section in a part."""
        return [size // parts + (part < size % parts) for size in self.sections]

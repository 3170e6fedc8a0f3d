"""How the weights of a foreign checkpoint become ours, and back: one `Entry` per parameter, nothing guessed by name.

A layout joins foreign tensors into one of ours and splits it again. The shapes a checkpoint must have follow from
splitting a tensor of our shape, so they are written nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.formats.state import check_names, check_tensor


class Layout(Protocol):
    """One way in which foreign tensors make up one of ours."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Foreign tensors, in the entry's order -> ours."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """Ours -> foreign tensors, in the entry's order. Works on the meta device."""


@dataclass(frozen=True)
class Rows:
    """Ours stacks the rows of several; `sizes` are their row counts, empty for one tensor as it is."""

    sizes: tuple[int, ...] = ()

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.split(self.sizes)) if self.sizes else [whole]


@dataclass(frozen=True)
class Transposed:
    """One matrix stored with inputs first, as GPT-2 does."""

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0].T

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole.T]


@dataclass(frozen=True)
class GroupedHeads:
    """One matrix (or bias) whose rows run group by group: the queries of a key head, its key, its value."""

    kv_heads: int
    head_dim: int

    def join(self, parts: list[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        groups = parts[0].view(self.kv_heads, -1, self.head_dim, *rest)
        query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
        return torch.cat([x.reshape(-1, *rest) for x in (query, key, value)])

    def split(self, whole: Tensor) -> list[Tensor]:
        rest, size = whole.shape[1:], self.kv_heads * self.head_dim
        query, key, value = whole.split((whole.shape[0] - 2 * size, size, size))
        groups = [x.view(self.kv_heads, -1, self.head_dim, *rest) for x in (query, key, value)]
        return [torch.cat(groups, dim=1).reshape(whole.shape)]


@dataclass(frozen=True)
class Experts:
    """Ours stacks the experts; each is made of `len(sizes)` matrices whose rows are stacked (gate, then up)."""

    sizes: tuple[int, ...]

    def join(self, parts: list[Tensor]) -> Tensor:
        per_expert = len(self.sizes)
        return torch.stack([torch.cat(parts[i : i + per_expert]) for i in range(0, len(parts), per_expert)])

    def split(self, whole: Tensor) -> list[Tensor]:
        return [part for expert in whole.unbind() for part in expert.split(self.sizes)]


@dataclass(frozen=True)
class Reshaped:
    """The same values under another shape."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0].reshape(self.ours)

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole.reshape(self.theirs)]


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the foreign tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Rows()


def same(ours: str, theirs: str, *, bias: bool = False) -> list[Entry]:
    """A part whose weight (and bias) is the foreign one as it is; the names are those of the modules."""
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", *(["bias"] if bias else []))]


def stacked(ours: str, theirs: Sequence[str], sizes: tuple[int, ...], *, bias: bool = False) -> list[Entry]:
    """A part that stacks the rows of several foreign ones."""
    return [
        Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), Rows(sizes))
        for kind in ("weight", *(["bias"] if bias else []))
    ]


def to_ours(
    tensors: Mapping[str, Tensor],
    entries: Sequence[Entry],
    model: nn.Module,
    where: str,
    *,
    dtype: torch.dtype,
    copies: Mapping[str, str] | None = None,
    derived: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Our state as `dtype`, buffers in float32, from foreign tensors, which are asked for one parameter at a time.

    model: on the meta device, for the shapes. copies, derived: see `check_stored`. Raises CheckpointError naming
    missing and surplus tensors, and one of another shape or type.
    """
    check_stored(tensors, entries, where, copies, derived)
    buffers = dict(model.named_buffers())
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *buffers.items())}
    state: dict[str, Tensor] = {}
    for entry in entries:
        parts = [checked_part(tensors, name, shape, where) for name, shape in part_shapes(entry, shapes[entry.ours])]
        # buffers are not weights: the bias that corrects a router's choice is too fine for bfloat16
        kept = torch.float32 if entry.ours in buffers else dtype
        state[entry.ours] = entry.layout.join(parts).to(kept).contiguous()
    return state


def check_stored(
    tensors: Mapping[str, Tensor],
    entries: Sequence[Entry],
    where: str,
    copies: Mapping[str, str] | None = None,
    derived: Sequence[str] = (),
) -> None:
    """Raise CheckpointError, naming it, for a foreign tensor that is missing or has no place.

    copies: foreign names that may be stored once more, and the tensor that each must equal. derived: endings of names
    that hold nothing of their own.
    """
    wanted = {name for entry in entries for name in entry.theirs}
    found = {name for name in tensors if not name.endswith(tuple(derived))} if derived else set(tensors)
    for copy, original in (copies or {}).items():
        if copy in found and copy not in wanted:
            found.remove(copy)
            if original in found and not torch.equal(tensors[copy], tensors[original]):
                raise CheckpointError(f"{where}: {copy} differs from {original}, yet the two are tied")
    check_names(wanted, found, where)


def part_shapes(entry: Entry, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the foreign tensors that make up one of ours of this shape."""
    parts = entry.layout.split(torch.empty(shape, device="meta"))
    return [(name, tuple(part.shape)) for name, part in zip(entry.theirs, parts, strict=True)]


def checked_part(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    """One foreign tensor. Raises CheckpointError when it is of another shape or no floating type."""
    tensor = tensors[name]
    check_tensor(name, tensor, shape, where)
    return tensor


def to_theirs(state: Mapping[str, Tensor], entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Foreign tensors from our state: views of it where the layout allows, which whoever writes them makes whole.

    Raises CheckpointError when a weight is not there as it was defined, as in a model made eight-bit.
    """
    out: dict[str, Tensor] = {}
    for entry in entries:
        if entry.ours not in state:
            raise CheckpointError(f"the model has no weight {entry.ours}: packed or quantised models are not written")
        parts = entry.layout.split(state[entry.ours])
        out.update(zip(entry.theirs, parts, strict=True))
    return out

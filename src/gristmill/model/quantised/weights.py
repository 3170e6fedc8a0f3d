"""Quantised matrices in the two forms that layers, kernels and checkpoints share, and plain rounding to them.

Eight bits: one scale per output channel. Four bits: one scale per output channel and group of inputs. Both are
symmetric: weight = whole number * scale, without an offset.

Source: Dettmers et al. 2022 (LLM.int8), section 2.1; groups: Frantar et al. 2022 (GPTQ), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gristmill.errors import CheckpointError, RequestError, closest
from gristmill.model.int8 import LEVELS, dequantise, quantise

Scheme = Literal["int8", "w8a8", "int4"]
"""int8 and int4: weights alone, activations stay floating. w8a8: activations too, one scale per token at each call."""

Bits = Literal[8, 4]
SCHEMES: tuple[Scheme, ...] = ("int8", "w8a8", "int4")
GROUP_SIZES = (32, 64, 128)
SLAB = 1 << 18
"""Values that are floating at a time where a whole matrix would take memory and leave the cache."""

_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
_RANGE: dict[Bits, tuple[int, int]] = {8: (-LEVELS, LEVELS), 4: (-8, 7)}


@dataclass(frozen=True)
class Int8Weight:
    """quantised: int8 (out, in), -127 to 127. scale: float32 (out, 1)."""

    quantised: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, inputs = self.quantised.shape
        return out, inputs

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of the scales."""
        return self.quantised.nbytes + self.scale.nbytes

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows, in float32."""
        return dequantise(self.quantised[rows], self.scale[rows])


@dataclass(frozen=True)
class Int4Weight:
    """packed: uint8 (out, in / 2), two inputs a byte, the first in the low nibble, each its value (-8 to 7) plus 8.
    scale: bfloat16 or float32 (out, in / group); it may be negative."""

    packed: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of the scales."""
        return self.packed.nbytes + self.scale.nbytes

    def dequantised(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows, in float32."""
        scale = self.scale[rows].float()
        codes = unpack(self.packed[rows]).view(*scale.shape, -1)
        return (codes.float() * scale[..., None]).flatten(1)


Weight = Int8Weight | Int4Weight


def pack(codes: Tensor) -> Tensor:
    """int8 (out, in), values -8 to 7 -> uint8 (out, in / 2) as `Int4Weight` has them."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[:, ::2] | unsigned[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The same back: int8 (out, in)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def scales_of(values: Tensor, bits: Bits) -> Tensor:
    """The scale of each row of values (..., count): float32 (..., 1), already rounded to how it is stored.

    Eight bits: the largest magnitude becomes 127. Four bits: the value of largest magnitude, with its sign, becomes
    -8, so that all 16 whole numbers are in use; of this scale and smaller ones, which cut that value, the one with the
    least squared error is taken, stored as bfloat16.
    """
    tiny = torch.finfo(torch.float32).tiny
    if bits == 8:
        return (values.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=tiny)
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    widest = torch.where(high > -low, high, low) / -8
    best, least = torch.full_like(widest, tiny), torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scale = (widest * share).bfloat16().float()
        scale = torch.where(scale.abs() < tiny, tiny, scale)
        error = (codes_of(values, scale, bits).mul_(scale).sub_(values)).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def codes_of(values: Tensor, scale: Tensor, bits: Bits) -> Tensor:
    """values / scale as the nearest whole numbers that there are, still floating."""
    return (values / scale).round_().clamp_(*_RANGE[bits])


def assemble(codes: Tensor, scale: Tensor, bits: Bits) -> Weight:
    """Whole numbers (out, in) and their scales (out, groups) in the form in which they are kept."""
    if bits == 8:
        return Int8Weight(codes.to(torch.int8), scale)
    return Int4Weight(pack(codes.to(torch.int8)), scale.bfloat16())


def round_to_nearest(weight: Tensor, bits: Bits, group_size: int = 32) -> Weight:
    """A floating matrix (out, in), every value rounded by itself, a slab of rows at a time.

    Raises CheckpointError for a value that is not finite, and for four bits for rows that groups do not divide.
    """
    parts = [_round_rows(rows, bits, group_size) for rows in weight.split(max(1, SLAB // max(1, weight.shape[1])))]
    return parts[0] if len(parts) == 1 else join(parts)


def join(parts: list[Weight]) -> Weight:
    """Matrices of the same inputs, their rows stacked. Four-bit scales of two types become float32."""
    fields = [(w.quantised, w.scale) if isinstance(w, Int8Weight) else (w.packed, w.scale) for w in parts]
    scales = [scale for _, scale in fields]
    if len({scale.dtype for scale in scales}) > 1:
        scales = [scale.float() for scale in scales]
    make: Callable[[Tensor, Tensor], Weight] = type(parts[0])
    return make(torch.cat([values for values, _ in fields]), torch.cat(scales))


def check_scheme(scheme: str, group_size: int) -> None:
    """Raise RequestError for an unknown scheme or a group size that kernels do not have."""
    if scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise RequestError(f"scheme {scheme!r} is not one of {known}.{closest(scheme, SCHEMES)}", field="scheme")
    if group_size not in GROUP_SIZES:
        raise RequestError(f"group_size {group_size} is not one of {GROUP_SIZES}", field="group_size")


def check_embedding(tied: bool, head: bool, embedding: bool) -> None:
    """Raise RequestError for an embedding of eight bits whose tied head is to stay floating."""
    if embedding and tied and not head:
        raise RequestError(
            "embedding: the head is tied to it and would stay floating; quantise both", field="embedding"
        )


def bits_of(scheme: Scheme, inputs: int, group_size: int) -> Bits:
    """Bits of a layer's weights: four only where groups divide its inputs."""
    return 4 if scheme == "int4" and inputs % group_size == 0 else 8


def _round_rows(rows: Tensor, bits: Bits, group_size: int) -> Weight:
    values = rows.detach().float()
    if not bool(values.isfinite().all()):
        raise CheckpointError("a weight is not a finite number; get the checkpoint again")
    if bits == 8:
        return Int8Weight(*quantise(values, 1))
    if values.shape[1] % group_size:
        raise CheckpointError(f"rows of {values.shape[1]} values are no whole number of groups of {group_size}")
    groups = values.unflatten(1, (-1, group_size))
    scale = scales_of(groups, bits)
    return assemble(codes_of(groups, scale, bits).flatten(1), scale[..., 0], bits)

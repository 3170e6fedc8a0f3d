"""Activation-aware weight quantisation: widen the inputs that matter before rounding, narrow what feeds them.

Input i of a matrix is multiplied by s[i], and what gives that input divided by it: the weight of a norm, or the rows of
another matrix. The function stays the same, but the rounding of columns with large inputs becomes finer. s is
magnitude^alpha, alpha from a grid, chosen by the error of the outputs.

Source: Lin et al. 2023, eq. 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gristmill.model.attention.layer import Attention
from gristmill.model.block import Block
from gristmill.model.feedforward import FeedForward
from gristmill.model.norm import RMSNorm
from gristmill.model.quantised.calibrate import Inputs
from gristmill.model.quantised.weights import Bits, round_to_nearest

GRID = 20
"""Exponents tried are 0, 1/20 ... 1. The first is plain rounding."""


@dataclass(frozen=True)
class Fold:
    """A layer whose inputs can be scaled, and what gives them: a norm, or the last rows of a linear layer.

    repeats, size: an input of the source is `size` wide and read by so many heads in turn (grouped queries).
    """

    source: nn.Module
    name: str
    layer: nn.Linear
    repeats: int = 1
    size: int = 1

    def per_source(self, magnitude: Tensor) -> Tensor:
        """Mean over all that read the same value: (in,) -> (in / repeats,)."""
        return magnitude.view(-1, self.repeats, self.size).mean(1).flatten()

    def per_input(self, scale: Tensor) -> Tensor:
        """The scale of a source's value at every input that is one: (in / repeats,) -> (in,)."""
        return scale.view(-1, 1, self.size).expand(-1, self.repeats, -1).flatten()

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Multiply the inputs' columns by scale (in / repeats,) and divide their source by it. In place."""
        self.layer.weight.mul_(self.per_input(scale).to(self.layer.weight.dtype))
        if isinstance(self.source, nn.Linear):
            rows = slice(self.source.out_features - len(scale), None)
            self.source.weight[rows] /= scale[:, None].to(self.source.weight.dtype)
        elif isinstance(self.source, RMSNorm) and self.source.unit_offset:
            self.source.weight.add_(1).div_(scale).sub_(1)
        else:
            cast(Tensor, self.source.weight).div_(scale)
        if isinstance(bias := getattr(self.source, "bias", None), nn.Parameter):
            bias[-len(scale) :] /= scale.to(bias.dtype)


def folds(prefix: str, block: Block) -> Iterator[Fold]:
    """The places of a block where a scale can change sides: norm to projection, values to output projection, and up to
    down of a gated feed-forward layer. What reads a norm together with another layer, or values of or for another
    layer, is left out, as are layers that are not `nn.Linear`."""
    attention, mlp = block.self_attn, block.mlp
    alone = not (block.parallel and isinstance(block.feedforward_norm, nn.Identity))
    if isinstance(attention, Attention):
        if alone and not isinstance(block.attention_norm, nn.Identity):
            yield Fold(block.attention_norm, f"{prefix}self_attn.qkv_proj", attention.qkv_proj)
        if attention.own_value and not attention.used_again:
            repeats = attention.heads // attention.kv_heads
            name = f"{prefix}self_attn.o_proj"
            yield Fold(attention.qkv_proj, name, attention.o_proj, repeats, attention.head_dim)
    if isinstance(mlp, FeedForward):
        first = "gate_up_proj" if mlp.gated else "up_proj"
        if alone and not isinstance(block.feedforward_norm, nn.Identity):
            yield Fold(block.feedforward_norm, f"{prefix}mlp.{first}", getattr(mlp, first))
        if mlp.gated:
            yield Fold(mlp.gate_up_proj, f"{prefix}mlp.down_proj", mlp.down_proj)


def search_scale(fold: Fold, inputs: Inputs, bits: Bits, group_size: int) -> Tensor:
    """The scale (in / repeats,) with the least error of the outputs on `inputs`; ones when nothing is better."""
    weight = fold.layer.weight.detach().float()
    magnitude = fold.per_source(inputs.magnitude).clamp(min=1e-8)
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(GRID + 1):
        scale = magnitude ** (step / GRID)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        columns = fold.per_input(scale)
        error = round_to_nearest(weight * columns, bits, group_size).dequantised() / columns - weight
        found = float(((error @ inputs.hessian) * error).sum())
        if found < least:
            best, least = scale, found
    return best

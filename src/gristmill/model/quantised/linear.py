"""Layers with quantised weights: rows are expanded a slab at a time and multiplied as floating numbers.

These are the reference, on any device. `gristmill.engine.native` has kernels that read the same tensors as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.model.int8 import Int8Linear
from gristmill.model.quantised.weights import SLAB, Int4Weight, Int8Weight, Scheme, Weight

_FEW_ROWS = 8
"""Rows up to which torch's kernel for int8 and bfloat16 is faster than expanding: measured 4 times for one row, the
same at 16."""


class Int8WeightLinear(nn.Module):
    """x W' + bias with int8 weights; activations stay floating. Inference only."""

    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("quantised", weight.quantised)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's type."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < x[..., 0].numel() <= _FEW_ROWS:
            # the kernel's own scales are bfloat16: whole numbers first, our scales afterwards
            product = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.quantised, _ones(self.scale))
            out = product.float() * self.scale.T
            out = out if self.bias is None else out + self.bias.float()
            return out.to(x.dtype).view(*x.shape[:-1], -1)
        return _multiply(x, Int8Weight(self.quantised, self.scale), self.bias)


class Int4Linear(nn.Module):
    """x W' + bias with four-bit weights and a scale per group of inputs; activations stay floating. Inference only."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's type."""
        return _multiply(x, Int4Weight(self.packed, self.scale), self.bias)


class Int8Embedding(nn.Module):
    """Rows of an embedding in eight bits, one scale per token. A tied head can share the two tensors."""

    quantised: Tensor
    scale: Tensor

    def __init__(self, weight: Int8Weight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.register_buffer("quantised", weight.quantised)
        self.register_buffer("scale", weight.scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., width), of the type that the model computes in."""
        return (self.quantised[ids].float() * self.scale[ids]).to(self.dtype)


QuantisedLinear = Int8Linear | Int8WeightLinear | Int4Linear


def build_linear(weight: Weight, bias: Tensor | None, scheme: Scheme) -> QuantisedLinear:
    """The layer that a scheme puts in the place of a float one."""
    if isinstance(weight, Int4Weight):
        return Int4Linear(weight, bias)
    if scheme == "w8a8":
        return Int8Linear.from_quantised(weight.quantised, weight.scale, bias)
    return Int8WeightLinear(weight, bias)


def weight_of(layer: QuantisedLinear) -> Weight:
    """The matrix of a layer, whose memory it shares."""
    if isinstance(layer, Int4Linear):
        return Int4Weight(layer.packed, layer.scale)
    return Int8Weight(layer.quantised, layer.scale)


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    out, inputs = weight.shape
    step = max(1, SLAB // inputs)
    parts = []
    for begin in range(0, out, step):
        rows = slice(begin, begin + step)
        part = None if bias is None else bias[rows].to(x.dtype)
        parts.append(F.linear(x, weight.dequantised(rows).to(x.dtype), part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _ones(scale: Tensor) -> Tensor:
    return torch.ones(len(scale), dtype=torch.bfloat16, device=scale.device)

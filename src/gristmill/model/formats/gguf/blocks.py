"""Values of GGUF tensors: quantised blocks expanded to float32, a slab at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from gguf import dequantize
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.formats.gguf.reader import GGUFFile, TensorInfo

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTISED = frozenset(
    GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
_SLAB = 1 << 18
"""Values expanded at a time: they stay in a processor's cache, and little is in memory twice."""


def dtype_of(file: GGUFFile, tensor: TensorInfo) -> torch.dtype:
    """The type a tensor is read as: its own, or float32 for quantised ones. Raises CheckpointError for others."""
    if tensor.kind in _QUANTISED:
        return torch.float32
    if tensor.kind not in _PLAIN:
        names = ", ".join(kind.name for kind in (*_PLAIN, *sorted(_QUANTISED)))
        raise CheckpointError(f"{file.path}: tensor {tensor.name} has type {tensor.kind.name}; supported are {names}")
    return _PLAIN[tensor.kind]


def read_rows(file: GGUFFile, tensor: TensorInfo, out: Tensor, begin: int = 0) -> None:
    """Read the rows from row `begin` on into `out`, contiguous, (rows, *row shape), of any floating type.

    Raises CheckpointError for a type that is not supported and for a file that was cut.
    """
    plain = dtype_of(file, tensor) if tensor.kind in _PLAIN else None
    block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    first = begin * math.prod(tensor.shape[1:])
    flat = out.view(-1)
    for at in range(0, flat.numel(), _SLAB):
        part = flat[at : at + _SLAB]
        raw = file.read_bytes(tensor, (first + at) // block * block_bytes, part.numel() // block * block_bytes)
        if plain is not None:
            part.copy_(torch.from_numpy(raw).view(plain))
        else:
            # one row of many blocks: the library expands a few rows at a time, each at the same cost
            part.copy_(torch.from_numpy(dequantize(raw[None], tensor.kind)[0]))


def read_int4(file: GGUFFile, tensor: TensorInfo) -> tuple[Tensor, Tensor]:
    """The blocks of a Q4_0 matrix (rows, inputs) as they are: uint8 (rows, inputs / 2), the first of two inputs in the
    low nibble, each its value plus 8, and float32 scales (rows, inputs / 32).

    A block holds its 16 first values in low nibbles, the others in high ones. Raises CheckpointError for a cut file.
    """
    rows, inputs = tensor.shape
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_0]
    blocks = torch.from_numpy(file.read_bytes(tensor, 0, tensor.nbytes)).view(-1, block_bytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    nibbles = blocks[:, 2:]
    halves = torch.stack((nibbles & 15, nibbles >> 4), dim=1)  # (blocks, 2, 16)
    packed = halves[..., ::2] | halves[..., 1::2] << 4
    return packed.view(rows, inputs // 2), scale.view(rows, inputs // block)


def quantised_size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of this shape. Raises ValueError when blocks do not divide its rows."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} values are no multiple of {block}")
    return int(math.prod(shape) // block * block_bytes)


def to_bytes(values: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor as a file holds it: uint8, (rows, bytes). Raises ValueError as `quantised_size` does, and when a
    value is beyond float16."""
    from gguf import quantize

    if kind in _PLAIN:
        stored = values.detach().to("cpu", _PLAIN[kind]).contiguous()
        if not torch.isfinite(stored).all() and torch.isfinite(values).all():
            raise ValueError(f"a value is beyond the range of {kind.name}")
        return stored.view(-1).view(torch.uint8).numpy()
    packed: np.ndarray = quantize(values.detach().to("cpu", torch.float32).contiguous().numpy(), kind)
    return packed

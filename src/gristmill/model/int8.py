"""Linear layers in 8 bits: whole numbers from -127 to 127 and one scale per row in place of floating point.

Weights get a scale per output channel, once; activations get one per token, at every call. The product is one of
whole numbers and exact; the two scales bring it back. Nothing is calibrated and nothing is learned.

Source: Dettmers et al. 2022 (LLM.int8), section 2.1, vector-wise quantisation without the split of outliers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from gristmill.errors import CheckpointError

LEVELS = 127
_LONGEST = 2**31 // 128**2 - 1
"""Longest sum of products of two int8 that always fits in an int32."""


def quantise(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """x as int8 of its shape and float32 scales with size 1 along `dim`: x is about int8 * scale.

    Symmetric: the largest magnitude along `dim` becomes 127, so the error is at most scale / 2 (and float32's own
    rounding). Values that are not finite make the scale of their row so, and what is computed from it.
    """
    values = x.float()
    largest = values.abs().amax(dim, keepdim=True)
    scale = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)  # rows of zeros have one too
    return (values / scale).round().to(torch.int8), scale


def dequantise(quantised: Tensor, scale: Tensor) -> Tensor:
    """Back to float32."""
    return quantised.float() * scale


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, k) times the transpose of right (n, k), int8 both: exact, int32 (m, n).

    In whole numbers where the device has a kernel for these sizes, otherwise in float64, which holds such sums
    exactly. Raises CheckpointError when a sum of k products might not fit in an int32.
    """
    if left.shape[1] > _LONGEST:
        raise CheckpointError(
            f"an int8 product over {left.shape[1]} values may leave the range of int32: at most {_LONGEST} are possible"
        )
    if _has_kernel(left, right) and _kernel_is_exact(left.device):
        return torch._int_mm(left, right.T)
    return (left.double() @ right.double().T).to(torch.int32)


def _has_kernel(left: Tensor, right: Tensor) -> bool:
    if left.device.type == "cuda":  # the sizes that cuBLASLt takes
        return left.shape[0] > 16 and left.shape[1] % 8 == 0 and right.shape[0] % 8 == 0
    # torch's CPU kernel gives zeros for products of one value each
    return left.device.type == "cpu" and left.shape[0] > 0 and left.shape[1] > 1


@cache
def _kernel_is_exact(device: torch.device) -> bool:
    """Processors without 8-bit dot products may add pairs in 16 bits and cut off what does not fit."""
    left = torch.full((32, 64), LEVELS, dtype=torch.int8, device=device)
    signs = torch.where(torch.arange(32, device=device) % 2 == 0, 1, -1)[:, None]
    right = (left * signs).to(torch.int8)
    return bool((torch._int_mm(left, right.T) == (64 * LEVELS * LEVELS * signs.T)).all())


class Int8Linear(nn.Module):
    """x W' + bias with int8 weights and activations. Inference only: rounding has no gradient.

    `quantised` is int8 (out, in), `scale` float32 (out, 1): a quarter of the memory of float32. On one core with
    AVX-512 VNNI and 2048 x 2048 weights a call took a quarter of the time of float32, for one token as for 256.
    Without such instructions, or where the product falls back to float64, it is slower than float32.
    """

    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight (out, in), bias (out,). Raises CheckpointError when a weight is not finite."""
        super().__init__()
        if not bool(weight.isfinite().all()):
            raise CheckpointError("int8: a weight is not a finite number; get the checkpoint again, or use float32")
        self._take(*quantise(weight.detach(), dim=1), bias)

    @classmethod
    def from_quantised(cls, quantised: Tensor, scale: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """The layer of weights that are rounded already; it shares their memory."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(quantised, scale, bias)
        return layer

    def _take(self, quantised: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = quantised.shape
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's type."""
        rows, scale = quantise(x.reshape(-1, self.quantised.shape[1]), dim=1)
        out = integer_product(rows, self.quantised).float() * scale * self.scale.T
        if self.bias is not None:
            out = out + self.bias.float()
        return out.view(*x.shape[:-1], len(self.quantised)).to(x.dtype)

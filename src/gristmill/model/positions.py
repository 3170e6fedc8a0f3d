"""Rotary position embedding, half-split layout.

Source: Su et al. 2021 (RoFormer), eq. 34, with the two halves of a head paired as in Llama checkpoints.
"""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `positions` (tokens,), each (tokens, 1, head_dim).

    The sine table carries the sign of the first half, so that rotation is x * cos + swap_halves(x) * sin.
    Angles are computed in float32 whatever `dtype` is.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # divided, not raised to the negative power: far positions multiply the last bit, which is to be that of others
    angles = positions.to(torch.float32)[:, None] * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1)[:, None].to(dtype),
        torch.cat((-sin, sin), dim=-1)[:, None].to(dtype),
    )


def apply_rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (tokens, heads, head_dim) by the tables of its positions."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)

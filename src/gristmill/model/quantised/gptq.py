"""GPTQ: round the columns of a matrix one by one, and let the columns that are still floating make up for the error.

With H the second moments of the inputs, the error that rounding column i leaves in the outputs is least when the
columns after it move by -error / U[i, i] * U[i, i+1:], where U'U is the inverse of H, U an upper triangle.

Source: Frantar et al. 2022, eq. 2 and 3, and section 3.3 (blocks, Cholesky factor); order by activation: its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.errors import CheckpointError
from gristmill.model.quantised.weights import Bits, Weight, assemble, codes_of, scales_of

_BLOCK = 128
"""Columns that are rounded before the rest of the matrix hears of them: the result does not depend on it."""


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: Bits,
    group_size: int = 32,
    *,
    damping: float = 0.01,
    by_activation: bool = False,
    block: int = _BLOCK,
) -> Weight:
    """The matrix (out, in) rounded for inputs with second moments `hessian` (in, in); in float64.

    damping: share of the mean diagonal that is added to the diagonal. by_activation: columns with large inputs first;
    the scales are then those of the original weights, otherwise a group has its scale when its first column is reached
    (eight bits: one group of all columns). Inputs that are always zero are rounded to nearest.
    Raises CheckpointError when `hessian` is not finite or has no factor.
    """
    columns = weight.shape[1]
    width = columns if bits == 8 else group_size
    left = weight.detach().double()
    scale = scales_of(left.float().unflatten(1, (-1, width)), bits)[..., 0].double()  # (out, groups)
    moments = hessian.double()
    order = torch.argsort(moments.diagonal(), descending=True, stable=True) if by_activation else None
    if order is not None:
        left, moments = left[:, order], moments[order][:, order]
    factor = inverse_factor(moments, damping)
    left, codes = left.clone(), torch.empty_like(left)
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.empty_like(left[:, begin:end])
        for i in range(begin, end):
            place = i if order is None else int(order[i])
            group = place // width
            if order is None and i % width == 0:
                # the columns of this group know of all errors before `begin`, and of those of this block up to `end`
                ahead = left[:, i : i + width].clone()
                if i + width > end:
                    ahead[:, end - i :] -= errors[:, : i - begin] @ factor[begin:i, end : i + width]
                scale[:, group] = scales_of(ahead.float(), bits)[:, 0].double()
            codes[:, place] = codes_of(left[:, i], scale[:, group], bits)
            errors[:, i - begin] = (left[:, i] - codes[:, place] * scale[:, group]) / factor[i, i]
            left[:, i + 1 : end] -= errors[:, i - begin, None] * factor[i, i + 1 : end]
        left[:, end:] -= errors @ factor[begin:end, end:]
    return assemble(codes, scale.float(), bits)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangle U with U'U the inverse of the damped matrix, whose zero diagonals count as one.

    Raises CheckpointError when there is none.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damped = hessian + torch.diag(damping * diagonal.mean() + dead.to(hessian.dtype))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(damped.isfinite().all()):
        raise CheckpointError("gptq: the inputs of a layer are not finite or all alike; use more text or more damping")
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Mean square of the outputs' error over that of the outputs, for inputs with second moments `hessian`."""
    moments, exact = hessian.double(), weight.detach().double()
    error = exact - rounded.double()
    return float(((error @ moments) * error).sum() / ((exact @ moments) * exact).sum().clamp(min=1e-300))

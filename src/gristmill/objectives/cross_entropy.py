"""Cross-entropy of a linear head without ever holding all logits.

Rows are taken in chunks; each chunk's gradient is formed while its logits are at hand, so memory is one chunk of
logits instead of three copies of all of them, and the head is multiplied once, not twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gristmill.tokens.batch import IGNORED

_CHUNK_ROWS, _CHUNK_BYTES = 1024, 1 << 28
"""Rows of one chunk, and at most so many bytes of its float32 logits. Each chunk adds to the whole gradient of the
head: with few rows that traffic outweighs the product (at 50,257 tokens 83 rows take twice as long as 1,024)."""
_CACHE_BYTES = 1 << 24
"""Float32 logits that are exponentiated at once: they should stay in the cache between their passes."""


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """Sum over rows of -log softmax(hidden weight' + bias)[target], in nats; a float32 scalar.

    hidden (rows, size), weight (vocabulary, size), bias (vocabulary,), targets (rows,) int64; a row whose target is
    IGNORED counts nothing. With `softcap` logits are softcap * tanh(logits / softcap). Products run in the autocast
    type when autocast is on, sums and the softmax in float32.
    """
    # a head whose vocabulary is split over processes brings its own (gristmill.train.parallel.vocabulary)
    if (own := getattr(weight, "cross_entropy_sum", None)) is not None:
        split: Tensor = own(hidden, targets, bias, softcap)
        return split
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # inside the function gradients look wanted even under no_grad
    wanted = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in (hidden, weight, bias)]
    total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, dtype, softcap, wanted
    )
    return total


def reference_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """The same in plain lines: the oracle."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        wanted: list[bool],
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
        head, wide = weight.to(dtype), None if bias is None else bias.to(dtype)
        rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // (4 * weight.shape[0]), hidden.shape[0]))
        # made once: memory that is new to the process costs as much as a pass over it
        powers = torch.empty((rows, weight.shape[0]), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part, target = hidden[start : start + rows].to(dtype), targets[start : start + rows]
                counted = (target != IGNORED).float()
                target = target.masked_fill(target == IGNORED, 0)
                e = powers[: len(part)]
                losses, scale, slope = _exponentials(part, head, wide, target, softcap, e)
                total += losses.mul_(counted).sum()
                # d loss / d logits = slope * (e * scale - one-hot); what is of a row goes to the small factors, so the
                # large one is read by the products alone
                scale, slope = (scale * counted)[:, None], (slope * counted)[:, None]
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = (e @ head).float() * scale - head[target].float() * slope
                if grad_weight is not None:
                    scaled = (part.float() * scale).to(dtype)
                    if dtype == grad_weight.dtype:
                        grad_weight.addmm_(e.T, scaled)
                    else:
                        grad_weight += e.T @ scaled
                    grad_weight.index_add_(0, target, part.float() * -slope)
                if grad_bias is not None:
                    grad_bias += (e.float() * scale).sum(dim=0)
                    grad_bias.index_add_(0, target, -slope[:, 0])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        hidden, weight, bias = (None if grad is None else grad * upstream for grad in ctx.saved_tensors)
        return (
            hidden,
            None if weight is None else weight.to(ctx.weight_dtype),
            None if bias is None else bias.to(ctx.weight_dtype),
            *(None,) * 4,
        )


def _exponentials(
    part: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write exp(logits - greatest) of each row into `out` (rows, vocabulary), times the slope of the cap if there is
    one. Returns, (rows,) each: the losses, 1 / the sum of the exponentials, and the slope at the target."""
    torch.mm(part, head.T, out=out)
    rows = max(16, _CACHE_BYTES // (4 * head.shape[0]) // 16 * 16)
    narrow = out.dtype != torch.float32
    room = out.new_empty((min(rows, len(out)) if narrow else 0, out.shape[1]), dtype=torch.float32)
    found = []
    for begin in range(0, len(part), rows):
        piece, at = out[begin : begin + rows], target[begin : begin + rows, None]
        logits = room[: len(piece)].copy_(piece) if narrow else piece
        if bias is not None:
            logits += bias
        slope = None
        if softcap is not None:
            bent = torch.tanh(logits / softcap)
            slope = 1 - bent.square()
            torch.mul(bent, softcap, out=logits)
        own, top = logits.gather(1, at), logits.amax(dim=1, keepdim=True)
        e = logits.sub_(top).exp_()
        total = e.sum(dim=1, keepdim=True)
        losses = total.log() + top - own
        if slope is not None:
            e *= slope
        if e is not piece:
            piece.copy_(e)
        found.append((losses, 1 / total, torch.ones_like(own) if slope is None else slope.gather(1, at)))
    losses, scale, slopes = (torch.cat(column)[:, 0] for column in zip(*found, strict=True))
    return losses, scale, slopes

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
        head, minus_one = weight.to(dtype), torch.full((1, 1), -1.0, device=hidden.device)
        rows = min(_CHUNK_ROWS, max(1, _CHUNK_BYTES // (4 * weight.shape[0])))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part, target = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
                counted = target != IGNORED
                target = target.masked_fill(~counted, 0)
                logits = part @ head.T
                if bias is not None:
                    logits += bias.to(dtype)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits.float() / softcap)
                logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
                total -= logprobs.gather(1, target).mul(counted).sum()
                if not any(wanted):
                    continue
                # d loss / d logits = softmax - one-hot, written over the log-probabilities; a row that does not
                # count is left out of the small factors instead of the large one
                grad_logits = logprobs.exp_().scatter_add_(1, target, minus_one.expand_as(target))
                if softcap is not None:
                    grad_logits *= 1 - (logits / softcap).square()
                if grad_bias is not None:
                    grad_bias += (grad_logits * counted).sum(dim=0)
                grad_logits = grad_logits.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = (grad_logits @ head).mul_(counted)
                if grad_weight is not None:
                    part = part * counted
                    if dtype == grad_weight.dtype:
                        grad_weight.addmm_(grad_logits.T, part)
                    else:
                        grad_weight += grad_logits.T @ part
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

"""Muon for stacks of matrices, such as the experts of a mixture. Single matrices go to torch.optim.Muon.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; rate: Liu et al. 2025, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StackedMuon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw and Nesterov momentum for weights (stack, rows, columns): each matrix is
    made orthogonal by itself."""

    def __init__(self, params: Any, lr: float = 1e-3, *, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. A closure is refused."""
        if closure is not None:
            raise TypeError("StackedMuon takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                mean = self.state[weight]["momentum_buffer"]
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(mean, group["momentum"]))
                scale = 0.2 * max(weight.shape[-2:]) ** 0.5  # the RMS of an AdamW update
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(stack: Tensor, *, steps: int = 5) -> Tensor:
    """Nearly U V^T of each matrix U S V^T of (stack, rows, columns), in bfloat16; singular values end near 1.

    Five Newton-Schulz steps of degree five, whose coefficients climb fast from 0 and do not settle at 1 exactly.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # Frobenius is at least the spectral norm
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

"""Lion: the sign of an interpolated momentum; one state tensor for each weight.

Source: Chen et al. 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """theta -= rate * (sign(lerp(gradient, m, beta1)) + decay * theta), then m = lerp(gradient, m, beta2)."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. A closure is refused."""
        if closure is not None:
            raise TypeError("Lion takes no closure")
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            means = [self.state[weight]["exp_avg"] for weight in weights]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(means, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_lerp_(means, gradients, 1 - beta2)

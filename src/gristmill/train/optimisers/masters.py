"""Float32 masters for weights kept in 16 bits: a step too small for bfloat16 is not lost, it adds up in the master.

Source: Micikevicius et al. 2018, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MasterWeights(torch.optim.Optimizer):
    """Runs `inner` on float32 copies of 16-bit weights, then rounds them back into the weights.

    `masters` maps each 16-bit weight to its copy, which `inner` updates. The weights must change by steps alone from
    then on: what else is written into them is lost at the next step.
    """

    def __init__(self, inner: torch.optim.Optimizer, masters: Mapping[nn.Parameter, Tensor]) -> None:
        self.inner, self.masters = inner, dict(masters)
        super().__init__(inner.param_groups, {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of `inner` with the gradients of the 16-bit weights. A closure is refused."""
        if closure is not None:
            raise TypeError("MasterWeights takes no closure")
        for weight, master in self.masters.items():
            master.grad = None if weight.grad is None else weight.grad.float()
        self.inner.step()
        for weight, master in self.masters.items():
            master.grad = None
            weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the 16-bit weights and of those that have no master."""
        super().zero_grad(set_to_none)
        for weight in self.masters:
            if set_to_none or weight.grad is None:
                weight.grad = None
            else:
                weight.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the masters in the order of the weights under "masters"."""
        return {**super().state_dict(), "masters": list(self.masters.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the masters go into place."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "masters"})
        for master, value in zip(self.masters.values(), state_dict["masters"], strict=True):
            master.copy_(value)
        self._share()

    def _share(self) -> None:
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        if share := getattr(self.inner, "_share", None):
            share()

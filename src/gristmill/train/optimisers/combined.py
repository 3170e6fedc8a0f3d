"""Several optimisers over disjoint weights that look like one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Combined(torch.optim.Optimizer):
    """Steps each part. `param_groups` are the groups of all parts in order; all parts keep their state in `state`."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every part. A closure is refused: it would be evaluated once a part."""
        if closure is not None:
            raise TypeError("a combined optimiser takes no closure")
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for all parts."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Give the parts this optimiser's own group and state objects, so that no copy can go out of date."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups = self.param_groups[begin:end]
            part.state = self.state
            begin = end

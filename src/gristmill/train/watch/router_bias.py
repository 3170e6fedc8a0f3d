"""Balance of experts without a loss: after each step overloaded experts become less likely to be chosen.

Source: Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1; DeepSeek-AI 2024 (V3), section 2.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gristmill.errors import GristmillError
from gristmill.model.moe import MixtureOfExperts, Routing, update_correction_bias
from gristmill.train.callbacks import Callback, Run


class RouterBias(Callback):
    """Calls `update_correction_bias` with the tokens of each step, over all processes, for every mixture that has such
    a bias; records expert_load by mixture: tokens of the busiest expert / the mean.

    A step without an update changes no bias either. The biases are buffers of the model and so in its checkpoints.
    Raises GristmillError for a rate that is not above 0, and in a run whose model has no such bias or is compiled.
    """

    def __init__(self, rate: float = 0.001) -> None:
        if not rate > 0.0:
            raise GristmillError(f"rate must be above 0, got {rate}")
        self.rate = rate
        self._mixtures: dict[str, MixtureOfExperts] = {}
        self._counts: dict[str, Tensor] = {}
        self._tokens: int | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self, run: Run) -> None:
        """Find the mixtures."""
        mixtures = {name: part for name, part in run.model.named_modules() if isinstance(part, MixtureOfExperts)}
        self._mixtures = {name: part for name, part in mixtures.items() if part.router.correction_bias is not None}
        if not self._mixtures:
            raise GristmillError(
                "the model has no bias to balance its experts by: set moe.correction_bias, or use "
                "gristmill.objectives.router.WithRouterLosses"
            )
        if run.config.compile:
            raise GristmillError("compiled blocks do not show their routing: RouterBias needs compile off")

    def before_step(self, run: Run) -> None:
        """Begin to count."""
        self._detach()
        self._counts = {
            name: torch.zeros(part.router.config.num_experts, dtype=torch.int64, device=part.router.weight.device)
            for name, part in self._mixtures.items()
        }
        self._handles = [run.module.register_forward_pre_hook(self._begin)]
        self._handles += [
            part.router.register_forward_hook(self._counting(name)) for name, part in self._mixtures.items()
        ]

    def gradients_ready(self, run: Run) -> None:
        """All tokens of the step are counted."""
        self._detach()

    def after_step(self, run: Run) -> None:
        """Move the biases."""
        if "skipped" in run.record:
            return
        flat = [count for counts in self._counts.values() for count in counts.tolist()]
        totals = iter(
            torch.tensor(run.world.sum(flat), dtype=torch.float64).split(
                [len(counts) for counts in self._counts.values()]
            )
        )
        run.record["expert_load"] = {}
        for name, part in self._mixtures.items():
            load = next(totals)
            update_correction_bias(part, load, self.rate)
            run.record["expert_load"][name] = float(load.max() / load.mean())

    def _begin(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self._tokens = getattr(arguments[0], "tokens", None)

    def _counting(self, name: str) -> Any:
        def count(router: torch.nn.Module, _: Any, routing: Routing) -> None:
            # rows beyond the batch's tokens round it up; recomputation counts every token once more, all alike
            if router.training:
                self._counts[name] += routing._replace(experts=routing.experts[: self._tokens]).counts()

        return count

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

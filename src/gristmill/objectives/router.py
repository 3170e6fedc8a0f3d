"""What a mixture of experts must lose besides its task, so that all experts are used and the router's logits stay
small.

Source: Fedus et al. 2022 (Switch Transformer), eq. 4-6 (balance); Zoph et al. 2022 (ST-MoE), eq. 5 (z-loss).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gristmill.core import Batch, Objective
from gristmill.errors import CheckpointError, GristmillError
from gristmill.model.moe import RouterStats, Routing, collect_router_stats, load_balancing_loss
from gristmill.objectives.single import TERM

TASK, BALANCE, Z = "task", "router_balance", "router_z"


class WithRouterLosses:
    """An `Objective` with two more terms over the tokens of a batch, each the mean over the mixtures of a model:

    router_balance, see `load_balancing_loss`, of each mixture by itself: pooled, one that favours an expert would hide
    another that starves it. It is a product of means over one batch, so a step has the mean of its batches' values: it
    is the one term that depends on how tokens are dealt into batches. router_z, the squared logarithm of the summed
    exponentials of the router's logits.

    A term of weight 0 is left out. The term of an objective that has one alone is called "task" here. Rows beyond the
    tokens of the batch, with which objectives round it up, do not count. Raises GristmillError for weights below 0.
    `loss_sums` raises CheckpointError when no mixture of experts was seen at work.
    """

    def __init__(self, objective: Objective, *, balance: float = 0.01, z: float = 0.001) -> None:
        for name, weight in (("balance", balance), ("z", z)):
            if not 0.0 <= weight < math.inf:
                raise GristmillError(f"the weight of the router's {name} must be 0 or more, got {weight}")
        self.objective = objective
        self._own = {name: weight for name, weight in ((BALANCE, balance), (Z, z)) if weight}
        self.weights: Mapping[str, float] = _renamed(objective.weights) | self._own
        self.extra_tokens: int = getattr(objective, "extra_tokens", 0)

    def prepare(self, examples: Sequence[Any], keys: Sequence[tuple[int, ...]]) -> Batch:
        """As the objective inside."""
        return self.objective.prepare(examples, keys)

    def counts(self, batch: Any) -> Mapping[str, int]:
        """Targets of the objective inside, and tokens."""
        return _renamed(self.objective.counts(batch)) | dict.fromkeys(self._own, batch.tokens)

    def loss_sums(self, model: torch.nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """See `Objective`."""
        with collect_router_stats(model) as stats:
            sums = _renamed(self.objective.loss_sums(model, batch))
        layers = [[_first(routing, batch.tokens) for routing in found] for found in stats.layers.values() if found]
        if not layers:
            raise CheckpointError(
                "router losses: no mixture of experts was seen at work. They need a model with feed_forward.moe, and "
                "`compile` off, because compiled blocks do not show their routing."
            )
        means = {BALANCE: _balance, Z: _z}
        for name in self._own:
            sums[name] = batch.tokens * torch.stack([means[name](layer) for layer in layers]).mean().float()
        return sums


def _renamed(terms: Mapping[str, Any]) -> dict[str, Any]:
    return {TASK if name == TERM else name: value for name, value in terms.items()}


def _first(routing: Routing, tokens: int) -> Routing:
    return Routing(*(part[:tokens] for part in routing))


def _balance(routings: list[Routing]) -> Tensor:
    return load_balancing_loss(RouterStats({"": routings}))


def _z(routings: list[Routing]) -> Tensor:
    return torch.cat([routing.logits for routing in routings]).logsumexp(dim=-1).square().mean()

"""Mixture of experts: a router sends each token to a few of many feed-forward layers.

No expert has a capacity, so no token is dropped: the tokens are sorted by expert and each expert takes what it gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gristmill.errors import CheckpointError
from gristmill.model.config import Activation, MoEConfig
from gristmill.model.feedforward import FeedForward, activation


class Routing(NamedTuple):
    """Where tokens go. probabilities (tokens, num_experts) sum to 1; weights and experts (tokens, top_k); logits
    (tokens, num_experts) are what they were made of."""

    probabilities: Tensor
    weights: Tensor
    experts: Tensor
    logits: Tensor

    def counts(self) -> Tensor:
        """How many tokens each expert got, (num_experts,)."""
        chosen = self.experts.flatten()
        zeros = chosen.new_zeros(self.probabilities.shape[-1])
        return zeros.scatter_add_(0, chosen, torch.ones_like(chosen))  # bincount would make the host wait for the GPU


class Router(nn.Module):
    """Chooses top_k experts per token and their weights, in float32 at least, whatever the model computes in.

    Source: Shazeer et al. 2017; groups: DeepSeek-AI 2024 (V2), section 2.2.2; sigmoid and correction bias:
    DeepSeek-AI 2024 (V3), eq. 12-16.
    """

    correction_bias: Tensor | None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.register_buffer("correction_bias", torch.zeros(config.num_experts) if config.correction_bias else None)

    def forward(self, x: Tensor) -> Routing:
        """x (tokens, hidden_size)."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):  # rounding would change who is chosen
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.weight.to(wide))
        if config.scoring == "softmax":
            scores = probabilities = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(dim=-1, keepdim=True)
        experts = self._choose(scores.detach())
        weights = scores.gather(1, experts)
        if config.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        return Routing(probabilities, weights * config.scale, experts, logits)

    def _choose(self, scores: Tensor) -> Tensor:
        config = self.config
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        if config.top_groups < config.num_groups:
            grouped = scores.unflatten(1, (config.num_groups, -1))
            best = grouped.topk(1 if config.group_score == "max" else 2, dim=-1).values.sum(dim=-1)
            closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(config.top_groups).indices, False)
            scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        return scores.topk(config.top_k, dim=-1).indices


class MixtureOfExperts(nn.Module):
    """Sum over a token's experts e of weight_e * down_e(act(gate_e(x)) * up_e(x)), plus the shared expert's output.

    gate_up_proj (experts, 2 * intermediate, hidden), gate rows first; down_proj (experts, hidden, intermediate).
    `grouped`: on a GPU in bfloat16 all experts are one grouped product; False computes one after the other, as
    everywhere else. The order of sums is fixed: the same input gives the same bits again.

    Source: Gale et al. 2023 (MegaBlocks), dropless routing; shared experts: Dai et al. 2024 (DeepSeekMoE).
    """

    def __init__(self, hidden_size: int, config: MoEConfig, act: Activation = "silu") -> None:
        super().__init__()
        experts, inner = config.num_experts, config.intermediate_size
        self.router = Router(hidden_size, config)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, inner))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=inner**-0.5)
        shared = config.shared_intermediate_size
        self.shared_expert = FeedForward(hidden_size, shared, act, gated=True) if shared else None
        self.act = activation(act)
        self.grouped = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) keeps its shape."""
        flat = x.flatten(0, -2)
        routing = self.router(flat)
        order = routing.experts.flatten().argsort(stable=True)  # the places (token, choice), expert by expert
        rows = flat[order // routing.experts.shape[1]]
        counts = routing.counts()
        out = self._grouped(rows, counts) if self._can_group(rows) else self._one_by_one(rows, counts)
        # back to (token, choice) by a permutation, not by adding into place: atomic adds have no fixed order
        chosen = out[order.argsort()].unflatten(0, routing.experts.shape)
        y: Tensor = (chosen * routing.weights[..., None]).sum(dim=1).to(x.dtype).view_as(x)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return y

    def _can_group(self, rows: Tensor) -> bool:
        wide = (self.down_proj.shape[1] * 2) % 16 == 0 and (self.down_proj.shape[2] * 2) % 16 == 0  # bytes of a row
        same = rows.dtype == self.down_proj.dtype == torch.bfloat16
        return self.grouped and rows.is_cuda and same and wide and hasattr(F, "grouped_mm") and len(rows) > 0

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(self.act(gate) * up, self.down_proj.mT, offs=ends)

    def _one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = [
            _expert(part, self.gate_up_proj[index], self.down_proj[index], self.act)
            for index, part in enumerate(rows.split(counts.tolist()))
            if len(part)
        ]
        return torch.cat(parts) if parts else rows


def reference_mixture(moe: MixtureOfExperts, x: Tensor) -> Tensor:
    """The same function of x (tokens, hidden), token by token and expert by expert."""
    outputs = []
    for token, weights, experts in zip(x, *moe.router(x)[1:3], strict=True):
        parts = [
            weight * _expert(token, moe.gate_up_proj[expert], moe.down_proj[expert], moe.act)
            for weight, expert in zip(weights, experts.tolist(), strict=True)
        ]
        if moe.shared_expert is not None:
            parts.append(moe.shared_expert(token))
        outputs.append(torch.stack(parts).sum(dim=0))
    return torch.stack(outputs)


@dataclass
class RouterStats:
    """The routings of every mixture, by the name of its layer, in the order of the forward passes."""

    layers: dict[str, list[Routing]] = field(default_factory=dict)

    def counts(self, name: str) -> Tensor:
        """Tokens per expert of one layer over all its passes, (num_experts,)."""
        return torch.stack([routing.counts() for routing in self.layers[name]]).sum(dim=0)


@contextmanager
def collect_router_stats(model: nn.Module) -> Iterator[RouterStats]:
    """Gather the routings of all forward passes inside the `with`; outside it nothing is kept.

    Run `backward` after it: a checkpointed layer that is computed again inside would be counted twice. Names are those
    of the MixtureOfExperts modules, so `model.get_submodule(name)` is the layer.
    """
    stats = RouterStats({name: [] for name, part in model.named_modules() if isinstance(part, MixtureOfExperts)})

    def keep(name: str) -> Any:
        return lambda module, args, routing: stats.layers[name].append(routing)

    handles = [
        part.router.register_forward_hook(keep(name))
        for name, part in model.named_modules()
        if isinstance(part, MixtureOfExperts)
    ]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(stats: RouterStats) -> Tensor:
    """num_experts * sum over experts of (share of tokens that chose it) * (its mean probability), all layers together.

    Its least value is top_k, when all experts are used alike. The gradient comes through the probabilities. It is a
    product of means: over parts of a batch it is not the mean of the parts' values. Raises CheckpointError when no
    mixture of experts has run.

    Source: Fedus et al. 2022 (Switch Transformer), eq. 4-6.
    """
    routings = [routing for layer in stats.layers.values() for routing in layer]
    if not routings:
        raise CheckpointError(
            "no mixture of experts has run: the load balancing loss needs a model with feed_forward.moe"
        )
    tokens = sum(len(routing.experts) for routing in routings)
    chosen = torch.stack([routing.counts() for routing in routings]).sum(dim=0) / tokens
    probability = torch.stack([routing.probabilities.sum(dim=0) for routing in routings]).sum(dim=0) / tokens
    return len(chosen) * (chosen * probability).sum()


@torch.no_grad()
def update_correction_bias(moe: MixtureOfExperts, counts: Tensor, rate: float = 0.001) -> None:
    """Make overloaded experts less and underloaded ones more likely to be chosen, by `rate`; weights do not change.

    counts (num_experts,): tokens per expert in the last step, summed over all workers. Raises CheckpointError when the
    mixture has no correction bias.

    Source: Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1.
    """
    bias = moe.router.correction_bias
    if bias is None:
        raise CheckpointError(
            "this mixture of experts has no bias to update: set moe.correction_bias in its configuration"
        )
    load = counts.to(bias)
    bias += rate * (load.mean() - load).sign()


def _expert(x: Tensor, gate_up: Tensor, down: Tensor, act: Any) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(act(gate) * up, down)


def _check(config: MoEConfig) -> None:
    members = config.num_experts // config.num_groups
    if config.top_k > config.top_groups * members:
        raise CheckpointError(
            f"moe.top_k ({config.top_k}) is more than the {config.top_groups * members} experts of moe.top_groups "
            f"({config.top_groups}) groups"
        )
    if config.group_score == "top2" and config.top_groups < config.num_groups and members < 2:
        raise CheckpointError(f"moe.group_score 'top2' needs groups of at least 2 experts, got {members}")
